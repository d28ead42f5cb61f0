#!/usr/bin/env bash
# Builds the wheel and runs tests against it, outside the checkout: `tests/wheel.sh PYTHON [pytest arguments]`.
#
# The environment is a fresh one. It borrows the dependencies of PYTHON's environment by path, which does not
# bring the editable install along: what the wheel forgot is missing here.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

cd "$checkout"
mkdir "$place/source" "$place/tree"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp -P --parents -t "$place/source"
(cd "$place/source" && "$python" -m build --wheel --no-isolation --outdir "$place" > "$place/build.log" 2>&1) || {
    cat "$place/build.log" >&2
    exit 1
}

"$python" -m venv --without-pip "$place/venv"
site=$("$place/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/borrowed.pth"
"$python" -m pip --disable-pip-version-check --python "$place/venv/bin/python" install -qq --no-deps --no-index "$place"/*.whl

# The tests and what they read of the checkout; not the package.
cp -R tests README.md CHANGELOG.md LICENSE pyproject.toml constraints.txt Makefile docs demo bench "$place/tree/"
cd "$place/tree"
"$place/venv/bin/python" - "$place" <<'END'
import sys
import neutral, neutral.cli, neutral.exporters, neutral.importers, neutral.schema
for package in (neutral, neutral.exporters, neutral.importers, neutral.schema):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
END
"$place/venv/bin/neutral" --version
"$place/venv/bin/python" -m pytest -p no:cacheprovider "$@"
