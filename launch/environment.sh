# shellcheck shell=bash
# Sourced by the scripts beside it. `prepare_environment [EXTRA]` leaves PYTHON: an interpreter with rlpipe installed.
#
# The active virtual environment is used if there is one (VIRTUAL_ENV), else .venv in this checkout, made when it is missing.
# A stamp inside the environment remembers what was installed, so later runs go straight to work and need no network.
#
# torch: pip takes whatever build its own configuration finds. On Linux the common index serves the CUDA build, some gigabytes
# that a machine without a GPU never uses; it works all the same. To choose another build, point pip at it in pip's own way and
# name it, for example RLPIPE_TORCH="torch==2.13.0+cpu" or RLPIPE_TORCH=/path/to/torch.whl: it is installed first.

NEEDS_PYTHON="import sys; sys.exit(sys.version_info < (3, 11))"

fail() {
    echo "error: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" > /dev/null && "$candidate" -c "$NEEDS_PYTHON" 2> /dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer on the PATH (found: $(python3 --version 2>&1 || true)). Install one, or activate a virtual" \
        "environment that has it"
}

prepare_environment() {
    local extra="${1:-}" environment found
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        environment="$VIRTUAL_ENV"
        "$environment/bin/python" -c "$NEEDS_PYTHON" ||
            fail "the active environment $environment has no Python 3.11 or newer; deactivate it, or make it with one"
    else
        environment="$PWD/.venv"
        if [ ! -x "$environment/bin/python" ]; then
            found="$(find_python)" || exit 1
            echo "making .venv with $found" >&2
            "$found" -m venv "$environment" ||
                fail "$found cannot make a virtual environment; on Debian and Ubuntu install the package python3-venv," \
                    "then remove $environment"
        fi
    fi
    PYTHON="$environment/bin/python"
    install_once "$environment" "$extra"
}

install_once() {
    local environment="$1" extra="$2" stamp="$1/.rlpipe-installed" wanted had had_extra
    wanted="$("$PYTHON" -c "$FINGERPRINT" pyproject.toml "$PWD" "${RLPIPE_TORCH:-}")"
    if [ -f "$stamp" ]; then
        read -r had had_extra < "$stamp" || true
        if [ "$had" = "$wanted" ] && { [ -z "$extra" ] || [ "$had_extra" = "$extra" ]; }; then
            return
        fi
    fi
    "$PYTHON" -c "import pip" 2> /dev/null || "$PYTHON" -m ensurepip > /dev/null 2>&1 ||
        fail "$environment has no pip; add it there, or remove the environment and run this again"
    echo "installing rlpipe${extra:+ [$extra]} into $environment (once; some minutes)" >&2
    if [ -n "${RLPIPE_TORCH:-}" ]; then
        "$PYTHON" -m pip install --quiet --disable-pip-version-check "$RLPIPE_TORCH" ||
            fail "pip could not install RLPIPE_TORCH=$RLPIPE_TORCH"
    fi
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}" ||
        fail "the installation failed; pip says why above. Run the same command again to continue"
    echo "$wanted $extra" > "$stamp"
}

FINGERPRINT="
import hashlib, pathlib, sys
parts = [pathlib.Path(sys.argv[1]).read_bytes(), sys.version.encode(), *map(str.encode, sys.argv[2:])]
print(hashlib.sha256(b'\0'.join(parts)).hexdigest())
"
