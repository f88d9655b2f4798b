#!/usr/bin/env bash
# Package and README from the notebooks; notebooks cleaned.
set -euo pipefail
cd "$(dirname "$0")/.."
nbdev_export
nbdev_clean
python scripts/build_readme.py
