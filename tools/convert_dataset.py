#!/usr/bin/env python
"""Write a data set in YOLO or Pascal VOC format as a COCO-format json.

    python tools/convert_dataset.py yolo fish/data.yaml train fish/train.json
    python tools/convert_dataset.py voc VOC2007 trainval VOC2007/trainval.json

Training takes both formats as they are (--register-yolo, --register-voc) and converts them at each start; this is for
large sets and other tools. Images stay where they are. The exit status is 0 if the json was written, 1 if a label file
has an error, 2 for a command line that cannot work.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # works without an installation too

from check_dataset import BAD_INPUT, lines_of

from d2_mgd.data.coco import ERROR
from d2_mgd.data.voc import read_voc
from d2_mgd.data.yolo import YoloFile, read_yolo
from d2_mgd.errors import UserError
from d2_mgd.training import write_atomically


def parser() -> argparse.ArgumentParser:
    built = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    built.add_argument("format", choices=["yolo", "voc"])
    built.add_argument("source", metavar="DATA_YAML | FOLDER", help="a YOLO data.yaml, or a Pascal VOC folder")
    built.add_argument("split", help="a key of the data.yaml (train, val, test); or a list or folder of the VOC folder")
    built.add_argument("json", help="the file to write")
    return built


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parser().parse_args(arguments)
    try:
        if args.format == "voc":
            labelled = read_voc(args.source, args.split)
        else:
            file = YoloFile.open(args.source)
            if args.split not in file.splits:
                raise UserError(f"{args.source} has no split {args.split!r}. Available: {', '.join(file.splits)}.")
            labelled = read_yolo(file, args.split)
    except UserError as error:
        print(f"convert_dataset.py: error: {error}", file=sys.stderr)
        return BAD_INPUT
    for finding in labelled.findings:
        print("\n".join(lines_of(finding)))
    if any(finding.severity == ERROR for finding in labelled.findings):
        print(f"convert_dataset.py: error: label files have errors, so {args.json} is not written.", file=sys.stderr)
        return 1
    content = labelled.content
    try:
        write_atomically(args.json, lambda file: file.write(json.dumps(content).encode()))
    except OSError as error:
        print(f"convert_dataset.py: error: {args.json} cannot be written: {error.strerror}.", file=sys.stderr)
        return BAD_INPUT
    numbers = ", ".join(f"{len(content[key]):,} {key}" for key in ("images", "annotations", "categories"))
    print(f"{args.json}: {numbers}\nuse it by --register-coco NAME {args.json} {labelled.image_root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
