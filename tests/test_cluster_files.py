"""launch/cluster.yaml, launch/kuberay.yaml and launch/submit.sh without the systems they are for: schemas, names, numbers, and
that every setting they use is one."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from rlpipe import recipe, schema
from rlpipe.config import LearnerConfig
from rlpipe.model_shapes import PUBLISHED
from rlpipe.models import memory
from rlpipe.supervise import settings

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")  # of Kubernetes
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
CHECKED = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"]


@pytest.fixture(scope="module")
def job() -> dict:
    return yaml.safe_load((LAUNCH / "kuberay.yaml").read_text(encoding="utf8"))


@pytest.fixture(scope="module")
def pods(job) -> dict[str, dict]:
    """Pod specs by group."""
    spec = job["spec"]["rayClusterSpec"]
    groups = {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


@pytest.mark.parametrize("script", CHECKED, ids=lambda path: path.name)
def test_shellcheck_is_content(script):
    found = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed; it is part of the extra dev")
    done = subprocess.run([found, "-x", "--source-path", str(ROOT), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "name", ["launch/slurm.sbatch", "launch/kuberay.yaml", "launch/cluster.yaml", "launch/submit.sh", "docs/cluster.md"]
)
def test_every_setting_that_a_file_names_exists(name):
    """`key=value` with a key of a recipe's shape, in commands and in comments."""
    known, text = set(schema.keys()), (ROOT / name).read_text(encoding="utf8")
    own = {"retries", "recipe", "run_id", "resume", "output_dir", "seed", "help", "dry_run"}
    used = (
        set(re.findall(r"(?<![\w./$-])([a-z_]+(?:\.[a-z_]+)+)=", text)) | set(re.findall(r"(?:^|\s)([a-z_]+)=\w", text)) & own
    )
    assert used - known - {"retries", "recipe", "help"} == set(), "no such key"
    assert used, "nothing was found; the pattern is wrong"
    for found in re.findall(r"recipe=([a-z_0-9.]+[a-z_0-9])", text):
        assert (ROOT / "recipes" / f"{found}.yaml").is_file(), f"no recipe {found}"
    for module in re.findall(r"python -m (rlpipe[.a-z_]*)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file() or (
            ROOT / module.replace(".", "/") / "__main__.py"
        ).is_file()


# ---- ray up


def test_the_cluster_file_is_what_ray_takes():
    config = yaml.safe_load((LAUNCH / "cluster.yaml").read_text(encoding="utf8"))
    rules = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, rules)
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    workers = {name: kind for name, kind in types.items() if name != config["head_node_type"]}
    assert config["max_workers"] == sum(kind["max_workers"] for kind in workers.values())
    assert all(0 <= kind["min_workers"] <= kind["max_workers"] for kind in workers.values())
    assert sum(kind["min_workers"] for kind in workers.values()) >= 1, "a run must find something to start on"
    for role in ("head", "worker"):
        stop, start = config[f"{role}_start_ray_commands"]
        assert "RAY_AUTH_MODE=token" in start and stop.endswith("ray stop")
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in config["head_start_ray_commands"][1]
    assert "$RAY_HEAD_IP:6379" in config["worker_start_ray_commands"][1]
    assert "--port=6379" in config["head_start_ray_commands"][1]


def test_so_is_the_one_for_google_cloud():
    text = (LAUNCH / "cluster.yaml").read_text(encoding="utf8")
    _, _, commented = text.partition("---- on Google Cloud")
    other = yaml.safe_load("\n".join(re.sub(r"^# ?", "", line) for line in commented.splitlines()[1:]))
    rules = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load(text) | other
    jsonschema.validate(config, rules)
    assert config["provider"]["type"] == "gcp" and set(other["available_node_types"]) == {"head", "gpu", "gpu_spot"}


# ---- KubeRay


def test_the_ray_job_has_the_fields_of_its_kind(job):
    assert job["apiVersion"] == "ray.io/v1" and job["kind"] == "RayJob" and LABEL.fullmatch(job["metadata"]["name"])
    spec = job["spec"]
    known = {
        "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "submissionMode", "rayClusterSpec",
        "activeDeadlineSeconds", "runtimeEnvYAML", "submitterPodTemplate", "submitterConfig", "entrypointNumCpus",
        "entrypointNumGpus", "entrypointResources", "jobId", "metadata", "suspend", "clusterSelector", "deletionStrategy",
    }  # fmt: skip
    assert spec.keys() <= known
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    assert isinstance(spec["backoffLimit"], int) and spec["shutdownAfterJobFinishes"] is True
    cluster = spec["rayClusterSpec"]
    known = {"rayVersion", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "autoscalerOptions", "authOptions"}
    assert cluster.keys() <= known and cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["upscalingMode"] in ("Default", "Aggressive", "Conservative")
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 60, 0), "as pyproject.toml asks for"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "KubeRay takes strings"
    for group in cluster["workerGroupSpecs"]:
        assert LABEL.fullmatch(group["groupName"]) and 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_pods_are_whole(pods):
    for name, pod in pods.items():
        (container,) = pod["containers"]
        assert LABEL.fullmatch(container["name"]) and container["image"] == "REGISTRY/rlpipe:latest"
        for amounts in container["resources"].values():
            assert all(isinstance(value, str) and QUANTITY.fullmatch(value) for value in amounts.values()), (name, amounts)
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests["memory"] == limits["memory"], "Ray would count on more than the pod gets"
        assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/shared", "/dev/shm"}
        assert all(set(variable) == {"name", "value"} and isinstance(variable["value"], str) for variable in container["env"])
    ports = {port["name"]: port["containerPort"] for port in pods["head"]["containers"][0]["ports"]}
    assert ports == {"gcs-server": 6379, "dashboard": 8265, "client": 10001}


def test_the_head_waits_for_the_run_to_save(pods):
    head = pods["head"]["containers"][0]
    (command,) = [head["lifecycle"]["preStop"]["exec"]["command"]]
    subprocess.run(["bash", "-n", "-c", command[-1]], check=True)
    pattern = re.search(r"run='([^']+)'", command[-1])[1]
    for python in ("python", "/home/ray/anaconda3/bin/python3.11"):
        assert re.search(pattern, f"{python} -m rlpipe.supervise retries=3 -- …")
    shell = "/bin/sh -c python -m rlpipe.supervise retries=3 -- …"  # whose death Ray answers by killing its process group
    assert not re.search(pattern, shell) and not re.search(pattern, " ".join(command)), "nor itself"
    wait = {variable["name"]: variable["value"] for variable in head["env"]}["RAY_JOB_STOP_WAIT_TIME_S"]
    assert int(wait) < pods["head"]["terminationGracePeriodSeconds"]


def test_the_entrypoint_fits_the_cluster_it_starts_on(job, pods):
    words = job["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "rlpipe.supervise"]
    command, retries, _ = settings(words[3:])
    assert command[:3] == ["python", "-m", "rlpipe.run"] and retries >= 1
    cfg = recipe.load(command[3:])
    assert cfg.run_id and cfg.resume == "auto", "a new cluster continues this run"
    assert cfg.output_dir.startswith("/shared/") and cfg.cluster.start_timeout_s >= 600, "nodes take minutes to come"
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    gpus = int(pods["gpu"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    learner = cfg.learner.workers * cfg.learner.gpus * (2 if cfg.value.enabled else 1)
    assert learner + cfg.rollout.min_workers * cfg.rollout.gpus <= group["minReplicas"] * gpus
    assert learner + cfg.rollout.workers * cfg.rollout.gpus <= group["maxReplicas"] * gpus
    cpus = int(pods["gpu"]["containers"][0]["resources"]["limits"]["cpu"])
    need = cfg.learner.workers * cfg.learner.cpus + cfg.rollout.min_workers * cfg.rollout.cpus + cfg.verifier.cpus
    assert need <= group["minReplicas"] * cpus


# ---- submit.sh

CLIENT = """
class JobStatus:
    SUCCEEDED = "SUCCEEDED"

class JobSubmissionClient:
    def __init__(self, address):
        print("address", address)
    def submit_job(self, entrypoint, runtime_env):
        print("entrypoint", entrypoint)
        print("env_vars", runtime_env["env_vars"])
        raise SystemExit(0)
"""


@pytest.mark.parametrize(
    "variables, entrypoint, wait",
    [
        ({}, "python -m rlpipe.supervise retries=3 -- python -m rlpipe.run recipe=quickstart 'a=[1, 2]'", "300"),
        ({"RLPIPE_RETRIES": "0"}, "python -m rlpipe.run recipe=quickstart 'a=[1, 2]'", "300"),
        (
            {"RLPIPE_RETRIES": "7", "RLPIPE_ENTRYPOINT": "python -m rlpipe.sft", "RLPIPE_STOP_WAIT_S": "20"},
            "python -m rlpipe.supervise retries=7 -- python -m rlpipe.sft recipe=quickstart 'a=[1, 2]'",
            "20",
        ),
    ],
)
def test_a_submitted_job_runs_under_the_supervisor(tmp_path, variables, entrypoint, wait):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").touch()
    (tmp_path / "ray" / "job_submission.py").write_text(CLIENT)
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(tmp_path)} | variables
    command = ["bash", str(LAUNCH / "submit.sh"), "recipe=quickstart", "a=[1, 2]"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert said["entrypoint"] == entrypoint and said["address"] == "http://127.0.0.1:8265"
    assert said["env_vars"] == str({"RAY_JOB_STOP_WAIT_TIME_S": wait})


# ---- docs/cluster.md

MODELS = {
    "SDAR-1.7B": "JetLM/SDAR-1.7B-Chat", "SDAR-4B, TraDo-4B": "JetLM/SDAR-4B-Chat",
    "TraDo-8B, SDAR-8B": "Gen-Verse/TraDo-8B-Instruct", "LLaDA-8B": "GSAI-ML/LLaDA-8B-Instruct",
    "Dream-7B, DiffuCoder-7B": "Dream-org/Dream-v0-Instruct-7B", "LLaDA2.0-mini (MoE)": "inclusionAI/LLaDA2.0-mini",
    "SDAR-30B-A3B (MoE)": "JetLM/SDAR-30B-A3B-Sci",
}  # fmt: skip
TOKENS, BUDGET = 2784, 16384  # as the text says


def about(text: str) -> str:
    """A number as the table rounds it."""
    value = float(text)
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def row_of(path: str) -> list[str]:
    """The table's columns after the name, from the shape."""
    published, targets = PUBLISHED[path], LearnerConfig().lora_targets
    shape, parameters = published.shape, published.shape.parameters
    rows = 64 * (published.block or 1024)
    rollout = memory.rollout_parts(shape, parameters, 2, slots=64, tokens=TOKENS, rows=rows)
    each = sum(part.nbytes for part in rollout if part.name != "weights") / 64
    slots = [max(0, int((memory.ROOM * gb * 1e9 - 2 * parameters) // each)) for gb in (24, 48, 80, 141)]

    def learner(ranks: int, stage: int = 3, offload: bool = False, trainable: int | None = None) -> tuple[float, float]:
        options = {"token_budget": BUDGET, "checkpointing": True, "trainable": trainable}
        parts = memory.learner_parts(shape, parameters, 2, ranks=ranks, stage=stage, offload=offload, **options)
        return memory.gpu_bytes(parts) / 1e9, sum(part.nbytes for part in parts if part.on_host) / 1e9

    on_gpu, on_host = learner(8, offload=True)
    adapters = memory.adapter_parameters(shape, 32, targets)
    return [
        f"{parameters / 1e9:.2f}B" if parameters < 1e10 else f"{parameters / 1e9:.1f}B",
        about(2 * parameters / 1e9),
        " / ".join(str(number) if number else "–" for number in slots),
        " / ".join(f"{learner(ranks)[0]:.0f}" for ranks in (4, 8, 16)),
        f"{about(on_gpu)} + {about(on_host)}",
        f"{learner(1, 1, trainable=adapters)[0]:.0f}",
    ]


def test_the_table_of_sizes_is_what_the_estimates_say():
    lines = (ROOT / "docs" / "cluster.md").read_text(encoding="utf8").splitlines()
    rows = {cells[0]: cells[1:] for line in lines if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 7}
    for name, path in MODELS.items():
        assert rows[name] == row_of(path), name


def test_its_links_lead_somewhere():
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / "docs" / target).exists(), target
