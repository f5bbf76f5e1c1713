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
# RLPIPE_RETRIES  how often a driver that died is started again without having got further, 3 unless set: the entrypoint runs
#                 under `python -m rlpipe.supervise`, which continues its run from the last checkpoint. 0: no supervisor
# RLPIPE_STOP_WAIT_S  `ray job stop` sends SIGTERM, upon which the run finishes its step, saves and leaves with exit code 75,
#                 and kills it so many seconds later, 300 unless set (Ray's own default is 3)
# RLPIPE_ENTRYPOINT  what to run instead of `python -m rlpipe.run` (a script of your own)
#
# Give output_dir=/a/folder/that/outlives/the/cluster: `outputs` would be inside the uploaded copy on the head node.
#
# The same by hand, without retries of submission and with Ray's 3 s:
#
#     ray job submit --address http://HOST:8265 --working-dir . -- python -m rlpipe.supervise retries=3 -- \
#         python -m rlpipe.run recipe=quickstart output_dir=/shared/outputs
#     ray job list | logs JOB --follow | stop JOB            each with --address
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
entrypoint="${RLPIPE_ENTRYPOINT:-python -m rlpipe.run}"
retries="${RLPIPE_RETRIES:-3}"
if [ "$retries" != 0 ]; then
    entrypoint="python -m rlpipe.supervise retries=$retries -- $entrypoint"
fi
exec python - "$address" "$entrypoint" "${RLPIPE_STOP_WAIT_S:-300}" "$@" << 'PYTHON'
import asyncio, logging, shlex, sys, time

try:
    from ray.job_submission import JobStatus, JobSubmissionClient
except ImportError:
    sys.exit("error: this Python has no Ray; activate the environment that rlpipe is installed in")
logging.getLogger("ray").setLevel(logging.ERROR)  # one line per file that is not uploaded otherwise

address, entrypoint, stop_wait_s, *arguments = sys.argv[1:]
if not address.startswith("http"):
    sys.exit(f"error: RAY_ADDRESS={address} is not a job server; it must look like http://HOST:8265")
excludes = [".git", ".venv", ".ci", "outputs", "wandb", "tests", "docs", "build", "dist", "*.egg-info", "*.npz", "*.pt", "*.safetensors"]
command = f"{entrypoint} {shlex.join(arguments)}"
# read by the process that Ray starts the entrypoint from
runtime_env = {"working_dir": ".", "excludes": excludes, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": stop_wait_s}}


def submit(deadline):
    """Right after `ray start` the dashboard, then the job agent, take some seconds to come up."""
    while True:
        try:
            client = JobSubmissionClient(address)
            return client, client.submit_job(entrypoint=command, runtime_env=runtime_env)
        except (RuntimeError, ConnectionError) as error:
            starting = isinstance(error, ConnectionError) or "No available agent" in str(error)
            if not starting or time.monotonic() > deadline:
                sys.exit(f"error: {address} did not take the job: {str(error).strip().splitlines()[-1]}")
            print("the cluster's job agent is still starting; trying again in 3 s", file=sys.stderr, flush=True)
            time.sleep(3)


async def follow(client, job):
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


client, job = submit(time.monotonic() + 180)
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
