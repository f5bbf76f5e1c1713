"""One denoising step of every slot: forward, statistics, score, select, commit, edit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlpipe.models.attention import SlotCache
from rlpipe.models.executor import Executor
from rlpipe.models.policy import DiffusionLM
from rlpipe.sampling.caching import StepRows
from rlpipe.sampling.canvas import Canvas
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.editing import EditView
from rlpipe.sampling.guidance import Choice, Guided, agreement, settle
from rlpipe.sampling.memory import BlockMemory, Stability
from rlpipe.sampling.noise import EDIT, ORDER, POSITION_SCORE, TOKEN, uniform
from rlpipe.sampling.predictions import PredictionLog
from rlpipe.sampling.record import EditLog
from rlpipe.sampling.request import Request
from rlpipe.sampling.scoring import SCORERS, StepView, shuffled
from rlpipe.sampling.statistics import RowStatistics, row_statistics, token_statistics
from rlpipe.sampling.table import bias_matrix

HEAD_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # of a [rows, vocabulary] float32 tensor: on a CPU it should stay in the cache


class StepSampler:
    """Steps a canvas; holds what the steps share (bias rows, memories)."""

    def __init__(
        self,
        model: DiffusionLM,
        requests: Sequence[Request],
        decoder: Decoder,
        canvas: Canvas,
        cache: SlotCache,
        counters,
        log: EditLog | None,
        predictions: PredictionLog | None = None,
        guided: Guided | None = None,
    ):
        self.model, self.spec, self.decoder, self.predictions = model, model.spec, decoder, predictions
        self.canvas, self.cache, self.counters, self.log, self.guided = canvas, cache, counters, log, guided
        bias = bias_matrix(requests, model.lm.config.vocab_size)
        executor = Executor.of(model.lm)
        self.hidden = self._stock_hidden if executor is None else executor.hidden
        self.bias = None if bias is None else torch.as_tensor(bias, device=model.device)
        self.credit = None if decoder.fuse is None else BlockMemory()
        self.stability = Stability(decoder.selector.kl) if "stable" in decoder.selector.uses else None

    def moved(self, kept: torch.Tensor | None, restarted: torch.Tensor) -> None:
        """Slots were dropped (kept: those that stay) and some, bool [n] after that, start a block."""
        for memory in (self.credit, self.stability):
            if memory is not None:
                if kept is not None:
                    memory.keep(kept)
                memory.reset(restarted)

    def step(self) -> None:
        canvas, decoder = self.canvas, self.decoder
        position, inside = canvas.window()
        order = self._noise(position, POSITION_SCORE, decoder.ordered_by_noise)
        rows = decoder.cache.step_rows(canvas, order)
        masked = canvas.masked_at(position, inside) & rows.ready.unsqueeze(1) & rows.rows.gather(1, position)
        shadow = self._shadow(position, inside, rows.ready)
        beyond = self._beyond(position, masked, rows.ready)
        hidden, row_of = self._forward(rows, position, masked, shadow, beyond)
        laid_out = self._statistics(hidden, row_of, position, masked)
        if self.predictions is not None:
            drawn = None if beyond is None else (beyond, self._statistics(hidden, row_of, canvas.everywhere(), beyond, True))
            self.predictions.add(canvas, rows.ready, (position, masked, laid_out), drawn)
        schedule_time = canvas.time
        if decoder.selector.skips_idle_steps:
            schedule_time = decoder.schedule.useful(masked.sum(1), canvas.time)
        chosen, forced, score = self._choose(laid_out, position, masked, order, schedule_time)
        trace = {"score": score}
        if self.guided is not None:
            choice, laid_out = self._guide((chosen, forced), position, masked, laid_out, hidden, row_of, rows.ready)
            chosen, forced = choice.chosen, choice.forced
            trace["preset"] = choice.written  # shown to a learner and never scored: no draw of the policy
        trace |= {"logp": laid_out.logp, "logp_t1": laid_out.logp_t1, "confidence": laid_out.p_token, "forced": forced}
        accepted_before = canvas.accepted
        canvas.count_step(rows.ready, rows.clean, schedule_time, chosen.sum(1))
        canvas.commit(position, chosen, laid_out.token, trace)
        if self.log is not None:
            self.log.commits(canvas, position, chosen)
            old = self._shadow_probability(shadow, position, hidden, row_of)
            self._edit(position, inside & rows.ready.unsqueeze(1), chosen, old, schedule_time, accepted_before)
        if decoder.stop == "eotp":
            canvas.fill_behind_eos()
        if self.credit is not None or self.stability is not None:
            position, inside = canvas.window()
            self.moved(None, ~canvas.masked_at(position, inside).any(1))
        self.counters.forwards += 1
        self.counters.slot_steps += int(rows.ready.sum())

    def _beyond(self, position: torch.Tensor, masked: torch.Tensor, ready: torch.Tensor) -> torch.Tensor | None:
        """bool [n, W]: masked positions of the response that this step may not commit, if their predictions are recorded."""
        if self.predictions is None or not self.decoder.block_size:
            return None
        return self.canvas.masked_outside(position, masked) & ready.unsqueeze(1)

    def _stock_hidden(self, ids: torch.Tensor, where: torch.Tensor, plan) -> torch.Tensor:
        return self.model.hidden(ids, where, plan)[:, plan.wanted]

    def _noise(self, position: torch.Tensor, stream: int, wanted: bool = True) -> torch.Tensor:
        if not wanted:
            return torch.zeros(position.shape, dtype=torch.float64, device=position.device)
        return uniform(self.canvas.seed.unsqueeze(1), position, self.canvas.step.unsqueeze(1), stream)

    # --- forward -----------------------------------------------------------------------------------------------------------

    def _forward(self, plan: StepRows, position, masked, shadow: torch.Tensor | None, beyond: torch.Tensor | None):
        """Packed rows of all slots → (hidden [K, d] of the rows that somebody reads, which of them each grid cell is, int64
        [n, W (+ B)]). Shadow rows lie behind the canvas: MASK at a committed position, seeing everything but its token. beyond:
        masked positions bool [n, W] outside the window that are read too."""
        canvas, block, shift = self.canvas, self.spec.block_size, self.spec.logit_shift
        width = canvas.ids.shape[1]
        read = torch.zeros_like(plan.rows).scatter_add(1, position - shift, masked)  # a shift: the row before predicts
        if beyond is not None:
            read = read | beyond.roll(-shift, 1)  # column 0 holds a prompt token, so nothing wraps
        grid = plan.rows | read
        if shadow is not None:
            grid, read = torch.cat([grid, shadow], 1), torch.cat([read, shadow], 1)
        slot, store = grid.nonzero(as_tuple=True)
        wanted = read[slot, store].nonzero().squeeze(1)
        where, ids, hidden_key = store, None, None
        if shadow is not None:
            is_shadow = store >= width
            where = torch.where(is_shadow, position[slot, (store - width).clamp_min(0)], store)
            ids = torch.where(is_shadow, self.spec.mask_token_id, canvas.ids[slot, where])
            hidden_key = torch.where(is_shadow, where, -1)
        ids = canvas.ids[slot, where] if ids is None else ids
        key_len = (where // block + 1) * block if block else canvas.end[slot]
        attention = self.cache.plan(slot, store, key_len, len(canvas), hidden_key, wanted)
        hidden = self.hidden(ids.unsqueeze(0), where.unsqueeze(0), attention)[0]
        row_of = (read.flatten().cumsum(0) - 1).view(read.shape)
        self.counters.rows += len(slot)
        self.counters.prefill_rows += len(slot) - int((plan.ready.unsqueeze(1) & grid).sum())
        self.counters.host_syncs += 6  # the sizes of two plans, the rows, the masked rows
        return hidden, row_of

    def _shadow(self, position: torch.Tensor, inside: torch.Tensor, ready: torch.Tensor) -> torch.Tensor | None:
        if self.decoder.editor is None or not self.decoder.editor.uses_shadow:
            return None
        behind = self.cache.keys[0].shape[1] - self.canvas.ids.shape[1]
        full = torch.zeros(len(ready), behind, dtype=torch.bool, device=ready.device)
        full[:, : position.shape[1]] = self._decoded(position) & inside & ready.unsqueeze(1)
        return full

    def _decoded(self, position: torch.Tensor) -> torch.Tensor:
        """bool [n, B]: holds a sampled token."""
        trace = self.canvas.trace
        return (trace["step"] > 0).gather(1, position) & ~trace["preset"].gather(1, position)

    # --- statistics --------------------------------------------------------------------------------------------------------

    def _statistics(self, hidden, row_of, position, masked, only_draw: bool = False) -> RowStatistics:
        """Row statistics of the masked positions, laid out as [n, B]; the head sees a bounded number of rows at a time.
        only_draw: positions that nothing is chosen from; they enter no memory of the active block."""
        canvas = self.canvas
        slot, column = masked.nonzero(as_tuple=True)
        greedy = canvas.uniform and self.decoder.temperature == 0
        noise = self._noise(position, TOKEN, not greedy)[slot, column]
        rows = row_of[slot, position[slot, column] - self.spec.logit_shift]
        parts = []
        step = max(1, HEAD_ELEMENTS[hidden.device.type] // self.model.lm.config.vocab_size)
        for start in range(0, max(len(rows), 1), step):
            part = slice(start, start + step)
            parts.append(self._part(hidden[rows[part]], slot[part], column[part], noise[part], masked.shape, only_draw))
        joined = parts[0] if len(parts) == 1 else RowStatistics(*(torch.cat(values) for values in zip(*parts, strict=True)))
        self.counters.head_rows += len(rows)
        return RowStatistics(*(_lay_out(values, slot, column, masked.shape) for values in joined))

    def _part(self, hidden, slot, column, noise, shape, only_draw) -> RowStatistics:
        canvas, decoder = self.canvas, self.decoder
        raw = self.model.logits(hidden)
        logits = self._biased(raw, slot)
        if self.credit is not None and not only_draw:
            logits = decoder.fuse.fuse(self.credit, logits, slot, column, shape)
        if self.stability is not None and not only_draw:
            self.stability.observe(logits, slot, column, shape)
        own = decoder if canvas.uniform else canvas
        pick = (lambda values: values) if canvas.uniform else (lambda values: values[slot])
        return row_statistics(
            logits,
            noise,
            pick(own.temperature),
            raw=None if logits is raw else raw,
            top_p=pick(own.top_p),
            top_k=pick(own.top_k),
            needs=frozenset() if only_draw else decoder.needs,
            confidence=decoder.confidence,
        )

    def _biased(self, logits: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """logits [M, V] of rows of the slots int64 [M], with the biases of their requests; the same if there are none."""
        if self.bias is None:
            return logits
        row = self.canvas.bias_row[slot]
        return torch.where((row >= 0).unsqueeze(1), logits + self.bias[row.clamp_min(0)], logits)

    # --- choice ------------------------------------------------------------------------------------------------------------

    def _choose(self, laid_out: RowStatistics, position, masked, order, schedule_time):
        """(commit bool, forced bool, score float32), [n, B]."""
        canvas, decoder = self.canvas, self.decoder
        score = SCORERS[decoder.score].score(laid_out, position, order)
        if decoder.eos_gamma < 1:
            is_eos = (laid_out.token.unsqueeze(-1) == canvas.stop_ids.unsqueeze(1)).any(-1)
            score = decoder.weigh_eos(score, is_eos, canvas.opened, schedule_time)
        ordered = score
        if decoder.order_temperature > 0:
            ordered = shuffled(score, self._noise(position, ORDER), decoder.order_temperature)
        uses = decoder.selector.uses
        view = StepView(
            score=ordered,
            masked=masked,
            statistics=laid_out,
            noise=order,
            quota=decoder.schedule.commits(canvas.opened, masked.sum(1), schedule_time),
            time=schedule_time,
            opened=canvas.opened,
            length=canvas.block_end - canvas.block_start,
            schedule=decoder.schedule,
            settled=canvas.mean_confidence() if "settled" in uses else None,
            stable=self.stability.steps(masked.shape[1]) if "stable" in uses else None,
        )
        chosen, forced = decoder.choose(view)
        return chosen, forced, score

    def _guide(self, base, position, masked, laid_out: RowStatistics, hidden, row_of, ready) -> tuple[Choice, RowStatistics]:
        """What is committed once the guide has read the draft, and its statistics; base: (commit, forced) of the plain
        selector."""
        guided, counters = self.guided, self.counters
        advice = guided.ask(position, masked, laid_out.token)
        agreed, refused = agreement(masked, laid_out.token, advice.answer)
        written = torch.zeros_like(agreed)
        if guided.guidance.correct:
            slot, column = (refused & (advice.answer >= 0)).nonzero(as_tuple=True)
            row = row_of[slot, position[slot, column] - self.spec.logit_shift]
            own = self._of_tokens(hidden[row], slot, advice.answer[slot, column])
            written[slot, column] = own.logp > float("-inf")  # not MASK, not forbidden by the request, an id that the model has
        choice = settle(base, agreed, written)
        if guided.guidance.correct:
            own = RowStatistics(*(_lay_out(values, slot, column, masked.shape) for values in own))
            pairs = zip(own, laid_out, strict=True)
            laid_out = RowStatistics(*(torch.where(choice.written, mine, drawn) for mine, drawn in pairs))
        guided.remember(advice.asked, choice.useful, ready)
        counters.guide_agreed += int((choice.chosen & agreed).sum())
        counters.guide_written += int(choice.written.sum())
        counters.host_syncs += 2
        return choice, laid_out

    def _of_tokens(self, hidden: torch.Tensor, slot: torch.Tensor, token: torch.Tensor) -> RowStatistics:
        """Statistics of tokens int64 [M] that others chose, one a row; -inf for ids that request or model cannot have."""
        raw = self.model.logits(hidden)
        temperature = self.canvas.temperature[slot]
        self.counters.head_rows += len(slot)
        return token_statistics(self._biased(raw, slot), raw, token, temperature, self.decoder.confidence)

    def _edit(self, position, inside, chosen, shadow, schedule_time, accepted_before) -> None:
        canvas, decoder = self.canvas, self.decoder
        view = EditView(
            decoded=self._decoded(position) & inside,
            fresh=chosen,
            confidence=canvas.trace["score"].gather(1, position),
            shadow=shadow,
            noise=self._noise(position, EDIT),
            left=decoder.schedule.left(canvas.opened, schedule_time),
            accepted_before=accepted_before,
            time=schedule_time,
            opened=canvas.opened,
            schedule=decoder.schedule,
        )
        taken = decoder.editor.remask(view) & inside
        canvas.remask(position, taken)
        self.log.remasks(canvas, position, taken, self.spec.mask_token_id)

    def _shadow_probability(self, shadow, position, hidden, row_of) -> torch.Tensor | None:
        """float32 [n, B]: probability of each shadowed token without seeing it, NaN elsewhere."""
        if shadow is None:
            return None
        width = self.canvas.ids.shape[1]
        slot, column = shadow.nonzero(as_tuple=True)
        logits = self.model.logits(hidden[row_of[slot, width + column]])
        token = self.canvas.ids[slot, position[slot, column]]
        self.counters.head_rows += len(slot)
        probability = torch.full(position.shape, float("nan"), device=position.device)
        probability[slot, column] = torch.log_softmax(logits, -1).gather(1, token.unsqueeze(1)).squeeze(1).exp()
        return probability


def _lay_out(values: torch.Tensor, slot: torch.Tensor, column: torch.Tensor, shape) -> torch.Tensor:
    out = torch.zeros(shape, dtype=values.dtype, device=values.device)
    out[slot, column] = values
    return out
