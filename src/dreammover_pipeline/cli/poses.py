# SPDX-License-Identifier: Apache-2.0
"""The command `dreammover poses`: finds the poses of a person in two photos.

torch and MediaPipe take seconds to import, so they are imported only after the arguments have been parsed.
"""

from __future__ import annotations

import argparse
import shlex

from ..media.files import check_file_path, check_picture_path, write_picture
from ..media.texts import write_text
from .writing import check_replaces_nothing


def add_poses(commands: argparse._SubParsersAction) -> None:
    """Register the command `poses`."""
    text = (
        "Find the most prominent person in each of two photos, and write both poses to files that the option --poses "
        "of dreammover interpolate takes. The command needs the extra 'poses' of the package."
    )
    parser = commands.add_parser("poses", help="find the poses of a person in two photos", description=text)
    parser.set_defaults(run=_poses)
    add = parser.add_argument
    add("img0", metavar="A", help="The first photo.")
    add("img1", metavar="B", help="The second photo.")
    add(
        "-o",
        "--output",
        metavar="PATH",
        required=True,
        help="What the names of the two files begin with: poses, or poses.json, makes poses_0.json and poses_1.json.",
    )
    add(
        "--picture",
        metavar="PATH",
        help="Also write a picture of both photos with the poses that were found to this .png or .jpg file.",
    )


def _poses(args: argparse.Namespace) -> None:
    """Find the two poses, and write them.

    Raises:
        ValueError: A path is refused, a photo cannot be read, a photo shows nobody, or no point is seen in both.
        RuntimeError: The extra is not installed.
    """
    files = [f"{args.output.removesuffix('.json')}_{i}.json" for i in (0, 1)]
    pictures = [args.picture] if args.picture else []
    for path in files:
        check_file_path(path, [".json"])
    for path in pictures:
        check_picture_path(path)
    check_replaces_nothing([*files, *pictures], [args.img0, args.img1])
    from ..images import decode_images
    from ..media.people import find_pose, openpose_json, poses_picture
    from ..poses import people_of_photos

    photos = [*decode_images(args.img0, "photo A"), *decode_images(args.img1, "photo B")]
    poses = [find_pose(photo) for photo in photos]
    nobody = [
        f"photo {name} ('{path}')"
        for name, path, pose in zip("AB", (args.img0, args.img1), poses, strict=True)
        if pose is None
    ]
    if nobody:
        raise ValueError(f"nobody was found in {' or in '.join(nobody)}, so nothing was written")
    people_of_photos(poses, [photo.shape[-2:] for photo in photos])  # refuses what --poses would refuse
    for path, pose in zip(files, poses, strict=True):
        write_text(path, openpose_json(pose))
    for path in pictures:
        write_picture(poses_picture(photos, poses), path)
    counts = [int((pose[:, 2] > 0).sum()) for pose in poses]
    shared = int(((poses[0][:, 2] > 0) & (poses[1][:, 2] > 0)).sum())
    print(f"{counts[0]} points were found in photo A, {counts[1]} in photo B, {shared} of them in both")
    print(f"--poses {shlex.join(files)}")
