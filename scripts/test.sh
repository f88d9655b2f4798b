#!/usr/bin/env bash
# Everything that must hold before a change lands: `make test` and, with --all, `make test-all`
# call it with .venv/bin first on PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# One thread a notebook: they already run in parallel, and small torch models are slower on several.
# passive: idle OpenMP threads sleep instead of spinning, which on few cores costs more than the work.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1

die() { echo "test.sh: $*" >&2; exit 1; }

# 1. Notebooks clean, package exported, README built. nbdev has no --check, so the steps are done and must change
#    nothing. Contents are compared rather than asking git, so that uncommitted work is no obstacle.
fingerprint() {
    find nbs safeeraser README* \( -name .ipynb_checkpoints -o -name __pycache__ \) -prune -o \
        -type f ! -name .last_checked -exec cksum {} + | sort -k 3
}
echo "== export, clean, README"
before=$(fingerprint)
start=$(mktemp); trap 'rm -f "$start"' EXIT
nbdev_export
# Every module is rewritten by the export; one that was not has no notebook (any more).
orphans=$(find safeeraser -name '*.py' ! -name '_*' ! -newer "$start")
[ -z "$orphans" ] || die "no notebook exports to: $orphans"
nbdev_clean
python scripts/build_readme.py
diff <(echo "$before") <(fingerprint) ||
    die "the files above were stale or not clean. They are brought up to date now: look them over and commit them."

# 2. The notebooks' own tests.
echo "== notebooks"
python scripts/run_notebooks.py

# 3. What crosses modules: a process a core, the tests of one file together since they share what they have made.
echo "== pytest"
those=(-m "not slow"); [ "${1-}" != --all ] || those=()
python -m pytest -q -n auto --dist loadscope --durations=10 "${those[@]}" tests
