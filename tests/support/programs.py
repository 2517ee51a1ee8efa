# SPDX-License-Identifier: Apache-2.0
"""Shell scripts that the fixture `program` puts in ffmpeg's place."""

# Says that it can encode H.264, and fails once it is to do so.
LATE_FAILURE = 'case "$*" in *-encoders*) echo libx264;; *) echo no more room >&2; exit 3;; esac'
