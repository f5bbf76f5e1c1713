"""One response of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from rlpipe.trajectory import Trajectory

SEED = 20_250_901  # of evaluation noise: the same for every run, so that runs are compared on the same draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """uid, sample: of the prompt, and which of its responses · tokens: those that count, EOS included · forwards: denoising
    steps; each is one forward for this response, and the commit of a block rides in the next one, so that only the prompt's
    prefill comes on top · stop: eos | length · exact: of an exact cache · parts: the verdict, None until it is there."""

    uid: str
    sample: int
    text: str
    tokens: int
    forwards: int
    stop: str
    exact: bool
    parts: dict[str, float] | None = None

    @classmethod
    def of(cls, trajectory: Trajectory, text: str) -> Sample:
        return cls(
            uid=trajectory.uid,
            sample=trajectory.sample,
            text=text,
            tokens=trajectory.valid_len,
            forwards=int(trajectory.events.step.max()) + 1,
            stop=trajectory.stop,
            exact=trajectory.exact,
        )
