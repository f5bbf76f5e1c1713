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
# The job's log is followed, and this script ends with the job's exit code. Interrupting it leaves the job running.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -n "${RAY_AUTH_TOKEN:-}" ]; then
    export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
fi
address="${RAY_ADDRESS:-http://127.0.0.1:8265}"
unset RAY_ADDRESS  # Ray would otherwise take it for the cluster's own address
exec python - "$address" "${RLPIPE_ENTRYPOINT:-python -m rlpipe.run}" "$@" << 'PYTHON'
import asyncio, logging, shlex, sys, time

try:
    from ray.job_submission import JobStatus, JobSubmissionClient
except ImportError:
    sys.exit("error: this Python has no Ray; activate the environment that rlpipe is installed in")
logging.getLogger("ray").setLevel(logging.ERROR)  # one line per file that is not uploaded otherwise

address, entrypoint, *arguments = sys.argv[1:]
if not address.startswith("http"):
    sys.exit(f"error: RAY_ADDRESS={address} is not a job server; it must look like http://HOST:8265")
excludes = [".git", ".venv", ".ci", "outputs", "wandb", "tests", "docs", "build", "dist", "*.egg-info", "*.npz", "*.pt", "*.safetensors"]
command = f"{entrypoint} {shlex.join(arguments)}"


def submit(deadline):
    """Right after `ray start` the dashboard, then the job agent, take some seconds to come up."""
    while True:
        try:
            client = JobSubmissionClient(address)
            return client, client.submit_job(entrypoint=command, runtime_env={"working_dir": ".", "excludes": excludes})
        except (RuntimeError, ConnectionError) as error:
            starting = isinstance(error, ConnectionError) or "No available agent" in str(error)
            if not starting or time.monotonic() > deadline:
                sys.exit(f"error: {address} did not take the job: {str(error).strip().splitlines()[-1]}")
            print("the cluster's job agent is still starting; trying again in 3 s", file=sys.stderr, flush=True)
            time.sleep(3)


async def follow(client, job):
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


client, job = submit(time.monotonic() + 60)
print(f"job {job} at {address}: {command}", file=sys.stderr, flush=True)
asyncio.run(follow(client, job))
while not client.get_job_status(job).is_terminal():
    time.sleep(0.5)
info = client.get_job_info(job)
if info.status != JobStatus.SUCCEEDED:
    print(f"job {job} {info.status.lower()}: {(info.message or '').strip().splitlines()[0] if info.message else ''}", file=sys.stderr)
code = info.driver_exit_code
sys.exit(code if code else int(info.status != JobStatus.SUCCEEDED))
PYTHON
