#!/usr/bin/env bash
# Runs the two commands of README.md with the newest or the oldest versions, in a new copy of this checkout:
#
#     tests/versions.sh newest [pytest arguments]    # the highest Python on this machine, the newest releases
#     tests/versions.sh oldest [pytest arguments]    # the lowest supported Python here, the releases of oldest.txt
#
# As in README.md, slow tests are left out; `tests/versions.sh newest -m ""` runs all of them.
# The copy and its environment stay in build/versions/. Set PYTHON to use another interpreter, and EXTRA to install
# more packages: EXTRA='-e .[peers]' tests/versions.sh oldest.
set -euo pipefail
cd "$(dirname "$0")/.."

which=${1:?say newest or oldest}
shift

supported() { # Prints the supported Pythons on the PATH and in pyenv, the lowest first.
  local IFS=: least
  least=$(sed -n 's/^requires-python = ">=3\.\([0-9]*\)"/\1/p' pyproject.toml)
  for folder in $PATH "$HOME"/.pyenv/versions/*/bin; do
    for python in "$folder"/python3.[0-9] "$folder"/python3.[0-9][0-9]; do
      # A Python without ensurepip (Debian without python3-venv) is skipped.
      [ -x "$python" ] && "$python" -c "
import ensurepip, sys
if sys.version_info >= (3, $least): print(sys.version_info.minor, sys.executable)" 2>/dev/null || true
    done
  done | sort -n -s -k1,1 | cut -d ' ' -f 2-
}

case $which in
  newest) python=${PYTHON:-$(supported | tail -n 1)} ;;
  oldest) python=${PYTHON:-$(supported | head -n 1)} ;;
  *) echo "say newest or oldest, not $which" >&2; exit 2 ;;
esac
[ -n "$python" ] || { echo "no Python on this machine is new enough for wdjax" >&2; exit 1; }

copy=build/versions/$which
rm -rf "$copy"
mkdir -p "$copy/bin"
git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
  if [ -e "$file" ]; then printf '%s\0' "$file"; fi
done | xargs -0 cp --parents -t "$copy"
cd "$copy"

# The README's commands call python3 and let pip choose the versions, so both are set here.
ln -s "$python" bin/python3
export PATH=$PWD/bin:$PATH
[ "$which" = newest ] || export PIP_CONSTRAINT=$PWD/tests/oldest.txt
mapfile -t commands < <(sed -n '/^```sh$/,/^```$/{/^```/!p}' README.md)

python3 -m venv .venv
# shellcheck disable=SC2086  # Several packages are several words.
[ -z "${EXTRA:-}" ] || .venv/bin/pip install -q $EXTRA
bash -ec "${commands[0]}"
bash -ec "${commands[1]} \"\$@\"" bash "$@"

echo
echo "$which: passed with"
.venv/bin/python - <<'PYTHON'
import importlib.metadata, platform

print("Python", platform.python_version())
libraries = "jax jaxlib optax flax chex equinox dm-haiku orbax-checkpoint numpy"
for name in f"{libraries} torch timm pytorch-optimizer keras jaxopt".split():
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
PYTHON
