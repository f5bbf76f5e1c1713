#!/usr/bin/env bash
# Run a recipe as a Ray job on a cluster that is already up:
#
#     ray start --head                                        once, on the head node (see the note on tokens)
#     bash launch/submit.sh recipe=quickstart seed=1          from this checkout; any key=value of a recipe
#
# RAY_ADDRESS     the job server, http://127.0.0.1:8265 unless set (the port the dashboard of `ray start --head` listens on)
# RAY_AUTH_TOKEN  Ray may ask for a token. Give the head and this script the same two variables before starting either:
#                     export RAY_AUTH_MODE=token
#                     export RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
# RLPIPE_ENTRYPOINT  what to run instead of `python -m rlpipe.run` (a script of your own)
#
# Every node needs rlpipe's dependencies installed; the source itself is uploaded, without results, environments and history.
# The job's log is followed, and this script ends with the job's exit code.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

address="${RAY_ADDRESS:-http://127.0.0.1:8265}"
case "$address" in
    http*://*) ;;
    *)
        echo "error: RAY_ADDRESS=$address is not a job server; it must look like http://HOST:8265" >&2
        exit 2
        ;;
esac
command -v ray > /dev/null || {
    echo "error: there is no ray command on the PATH; activate the environment that rlpipe is installed in" >&2
    exit 2
}
if [ -n "${RAY_AUTH_TOKEN:-}" ]; then
    export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
fi
unset RAY_ADDRESS  # the job must find its own cluster, and `ray job submit` takes the address below

excludes='[".git", ".venv", ".ci", "outputs", "wandb", "tests", "docs", "build", "dist", "*.egg-info", "__pycache__", "*.npz", "*.pt", "*.safetensors"]'
entrypoint="${RLPIPE_ENTRYPOINT:-python -m rlpipe.run}"
log="$(mktemp)"
trap 'rm -f "$log"' EXIT

# Right after `ray start` the job agent may not be up yet: the server answers 500 "No available agent" for some seconds.
for attempt in 1 2 3 4 5 6 7 8 9 10; do
    code=0
    # shellcheck disable=SC2086  # the entrypoint is meant to be split into words
    ray job submit --address "$address" --working-dir . --runtime-env-json "{\"excludes\": $excludes}" \
        -- $entrypoint "$@" 2>&1 | tee "$log" || code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ] && grep -q "No available agent to submit job" "$log"; then
        echo "the job agent is still starting; trying again in 3 s (attempt $attempt of 10)" >&2
        sleep 3
        continue
    fi
    exit "$code"
done
echo "error: no job agent came up at $address; look at the dashboard or the head node's log" >&2
exit 1
