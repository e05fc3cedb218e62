"""Deterministic passes: a reply depends on weights, prompt and seed, and on nothing that runs beside it.

Letters: M rows of a product, N outputs, K inputs, B sequences, H key-value heads, D head size, L positions.

What could let one sequence feel another, and what is done about it:

- A product may use another kernel, and another order of sums, for another number of rows. `prove_rows` finds out for
  which numbers every row comes out bitwise the same wherever it stands; `SteadyMatrix` computes in these numbers only,
  padding with zero rows.
- Attention padded to the longest sequence sums in an order that the longest decides. Here a sequence is padded to whole
  blocks of its own length, and only sequences of as many blocks attend in one call (`SteadyDecode`), after
  `AttentionProof` has seen that this changes no bit; else each attends alone.
- Prompts are never continued from another sequence's keys; each attends by itself (`SteadyPrefill`).
- Sampling goes row by row, and rotations come out of a table that is made in blocks of a fixed size.
- A family whose layers are not `FusedDecoderLayer`s (experts, say) is computed one sequence at a time.

`DeterministicPasses.prove` tries all of it with the real weights at start-up.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from slime.backends.embedded.attention import DecodeBatch, PrefillBatch, PrefillSegment, attend_grouped
from slime.backends.embedded.cache import LENGTH_STEP, SlotCache
from slime.backends.embedded.layer import gated
from slime.backends.embedded.linear import FusedRMSNorm, Matrix, StackedLinear
from slime.backends.embedded.model import ServedModel
from slime.backends.embedded.rotation import RotationTable, changing_rotations
from slime.backends.embedded.sampling import Sampled, Sampler, SamplingRow

BLOCK_ROWS = 64
"""Most rows of one product; more are computed block by block."""
TRIED_ROWS = (*range(1, 17), *range(20, BLOCK_ROWS + 1, 4))
"""Numbers of rows that are tried; those between are padded to the next that was proved."""
RUN_SIZES = (16, 8, 4, 2, 1)
"""How many sequences attend in one call."""
MAX_RUN = RUN_SIZES[0]
LONGEST_PROVED = 2048
"""Sequences of more positions attend alone: there is nothing to gain by then."""
ALLOCATED_BEYOND = (0, 3 * LENGTH_STEP)
"""The cache may hold so many positions more than are attended to: another stride, which must not matter."""
TRIAL_LENGTHS = (1, 66, 3, 17, 64, 31)
"""Prompts of the start-up trial."""
TRIAL_STEPS = 2


class DeterminismError(ValueError):
    """This model on this CPU cannot be computed so that no sequence feels another."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}, so replies would depend on what else runs. Start without --enable-deterministic-inference (and "
            "train without --deterministic-mode), or use another CPU type or torch version."
        )


# Products


def prove_matrix(num_rows: int, num_columns: int, like: Matrix, bias: Tensor | None) -> tuple[int, ...]:
    """`prove_rows` for products with matrices of this shape and of `like`'s kind.

    Rounded to bf16, sums in another order are nearly always the same numbers. So the trial's terms cancel in pairs: all
    that is left is the rounding of the partial sums, which another order changes for sure.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(num_columns, generator=generator)
    pairs, left_over = order[: num_columns // 2 * 2].view(2, -1), order[num_columns // 2 * 2 :]
    weight = _wide(num_rows, num_columns, like.dtype, generator)
    weight[:, pairs[1]] = -weight[:, pairs[0]]
    x = _wide(BLOCK_ROWS, num_columns, like.dtype, generator)
    x[:, pairs[1]] = x[:, pairs[0]]
    x[:, left_over] = 0
    matrix = type(like)(num_rows, num_columns, like.dtype)  # type: ignore[call-arg]
    matrix.write(0, weight)
    matrix.flush()
    return prove_rows(lambda rows: matrix.product(rows, None if bias is None else torch.zeros_like(bias)), x)


def _wide(num_rows: int, num_columns: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random numbers of very different sizes, so that their sums are rounded."""
    exponents = torch.randint(-6, 7, (num_rows, num_columns), generator=generator)
    return torch.randn(num_rows, num_columns, generator=generator).ldexp_(exponents).to(dtype)


def prove_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, ...]:
    """With how many rows `function` ([M, K] -> [M, ...]) is to be called; it is tried on rows of x [BLOCK_ROWS, K].

    Returns:
        for 0 to BLOCK_ROWS rows, the smallest number of at least as many rows for which every row came out bitwise as
        among BLOCK_ROWS rows, wherever it stood and whatever stood beside it.

    Raises:
        DeterminismError: rows change with their place even in whole blocks.
    """
    generator = torch.Generator().manual_seed(0)
    expected = function(x)
    best, sizes = 0, [0] * (BLOCK_ROWS + 1)
    for count in reversed(TRIED_ROWS):
        chosen = torch.randperm(BLOCK_ROWS, generator=generator)[:count]
        if torch.equal(function(x[chosen]), expected[chosen]):
            best = count
        elif count == BLOCK_ROWS:
            raise DeterminismError(f"A product of {list(x.shape)} in {x.dtype} gives a row other bits in another place")
        lower = max((tried for tried in TRIED_ROWS if tried < count), default=-1)
        sizes[lower + 1 : count + 1] = [best] * (count - lower)
    return tuple(sizes)


class SteadyMatrix:
    """A matrix whose product gives each row the same bits, however many rows there are; `sizes` is of `prove_rows`."""

    def __init__(self, matrix: Matrix, sizes: tuple[int, ...]) -> None:
        self.matrix, self.sizes, self.dtype = matrix, sizes, matrix.dtype
        self.write, self.flush, self.dense, self.release = matrix.write, matrix.flush, matrix.dense, matrix.release

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows <= BLOCK_ROWS and self.sizes[rows] == rows:
            return self.matrix.product(x, bias)
        flat = x.reshape(rows, -1)
        blocks = [self._block(block, bias) for block in flat.split(BLOCK_ROWS)]
        return (blocks[0] if len(blocks) == 1 else torch.cat(blocks)).view(*x.shape[:-1], -1)

    def _block(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.shape[0]
        missing = self.sizes[rows] - rows
        if not missing:
            return self.matrix.product(x, bias)
        return self.matrix.product(torch.cat([x, x.new_zeros(missing, x.shape[1])]), bias)[:rows]


@torch.inference_mode()
def make_steady(model: ServedModel) -> None:
    """Let every product of `model` give the same bits for any number of rows; raises `DeterminismError` if it cannot.

    Kernels are chosen by shape and dtype, so one trial serves all layers of a shape.
    """
    proved: dict[tuple[int, int, bool], tuple[int, ...]] = {}
    norms: set[int] = set()
    for module in model.module.modules():
        if isinstance(module, StackedLinear) and not isinstance(module.matrix, SteadyMatrix):
            key = (sum(module.sizes), module.in_features, module.bias is not None)
            if key not in proved:
                proved[key] = prove_matrix(*key[:2], module.matrix, module.bias)
            module.matrix = SteadyMatrix(module.matrix, proved[key])
        elif isinstance(module, FusedRMSNorm):
            module.few_rows = 0
            if module.shape[0] in norms:
                continue
            _refuse_padding(module, module.shape[0], model.dtype, "A norm")
            norms.add(module.shape[0])
    for width in {layer.gate_width for layer in model.fused_layers()}:
        _refuse_padding(gated, 2 * width, model.dtype, "A gate")


def _refuse_padding(function: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype, what: str) -> None:
    """Raise if a function, which is called with any number of rows, would have to be padded."""
    sizes = prove_rows(function, _wide(BLOCK_ROWS, width, dtype, torch.Generator().manual_seed(0)))
    changed = [count for count in TRIED_ROWS if sizes[count] != count]
    if changed:
        raise DeterminismError(f"{what} of width {width} gives other bits for {changed[0]} rows than for {BLOCK_ROWS}")


# Rotations


def fix_rotations(model: ServedModel) -> None:
    """Refuse rotations that depend on the longest sequence; put a table in the place of the others."""
    for name, kind in changing_rotations(model.module):
        raise DeterminismError(f"{name} computes rotations of type {kind}, which longer neighbours change")
    decoder: Any = model.module.get_decoder()
    if model.is_fused and not isinstance(decoder.rotary_emb, RotationTable):
        decoder.rotary_emb = RotationTable(decoder.rotary_emb)


# Attention


class AttentionProof:
    """Whether sequences of as many blocks may attend in one call; each shape is tried when it is first met."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._is_proved: dict[tuple[int, int, int, int, int], bool] = {}

    def holds(self, num_heads: int, group: int, key_dim: int, value_dim: int, length: int) -> bool:
        """For H heads with `group` query heads each, and `length` positions."""
        if length > LONGEST_PROVED:
            return False
        shape = (num_heads, group, key_dim, value_dim, length)
        if shape not in self._is_proved:
            self._is_proved[shape] = self._try(*shape)
        return self._is_proved[shape]

    def _try(self, num_heads: int, group: int, key_dim: int, value_dim: int, length: int) -> bool:
        """Try scores, then sums of values, whose terms cancel, for the reason that `prove_matrix` names."""
        generator = torch.Generator().manual_seed(length)

        def random(*shape: int) -> Tensor:
            return _wide(shape[0], math.prod(shape[1:]), self.dtype, generator).view(shape)

        allocated = length + max(ALLOCATED_BEYOND)
        query = random(MAX_RUN, num_heads, group, key_dim)
        keys, values = random(MAX_RUN, num_heads, key_dim, allocated), random(MAX_RUN, num_heads, allocated, value_dim)
        half = key_dim // 2
        paired_query, paired_keys, paired_values = query.clone(), keys.clone(), values.clone()
        paired_query[..., half : 2 * half] = query[..., :half]
        paired_keys[:, :, half : 2 * half] = -keys[:, :, :half]
        small_keys = keys / 64
        small_keys[..., length // 2 : length] = small_keys[..., : length // 2]
        paired_values[:, :, length // 2 : length] = -values[:, :, : length // 2]
        return self._is_steady(paired_query, paired_keys, values, 2.0**16, length) and self._is_steady(
            query, small_keys, paired_values, key_dim**-0.5, length
        )

    def _is_steady(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, length: int) -> bool:
        """query [MAX_RUN, H, group, D], keys and values as in the cache."""
        num_heads, group = query.shape[1:3]
        mask = torch.zeros(MAX_RUN, num_heads, group, length)
        expected = None
        for beyond in ALLOCATED_BEYOND:
            kept = keys[..., : length + beyond].contiguous(), values[:, :, : length + beyond].contiguous()
            for count in RUN_SIZES:
                rows = slice(MAX_RUN - count, None)
                out = attend_grouped(
                    query[rows].flatten(0, 1),
                    kept[0][rows, ..., :length].flatten(0, 1),
                    kept[1][rows, :, :length].flatten(0, 1),
                    mask[rows].flatten(0, 1),
                    scale,
                    few_values=0,
                ).view(count, num_heads, group, values.shape[-1])
                expected = out if expected is None else expected
                if not torch.equal(out, expected[rows]):
                    return False
        return True


def runs_of(positions: list[int]) -> list[tuple[int, int, int]]:
    """(first, end, length) of neighbouring sequences that need as many whole blocks, `RUN_SIZES` of them together."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    for num_blocks, neighbours in itertools.groupby(positions, lambda position: position // LENGTH_STEP + 1):
        end = start + len(list(neighbours))
        while start < end:
            size = next(size for size in RUN_SIZES if size <= end - start)
            runs.append((start, start + size, num_blocks * LENGTH_STEP))
            start += size
    return runs


@dataclass
class SteadyDecode:
    """The next token of B rows of the cache from `first_row`, each padded to whole blocks of its own length.

    positions: where each token stands in its sequence.
    """

    positions: list[int]
    proof: AttentionProof
    first_row: int = 0
    _masks: dict[tuple[int, int, int | None, int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = torch.arange(self.first_row, self.first_row + len(self.positions))
        self.columns = torch.tensor(self.positions)
        self.runs = runs_of(self.positions)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: SlotCache | None,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """As `Batch.attend`."""
        assert cache is not None
        cache.store(layer, self.rows, self.columns, key, value)
        keys, values = cache.keys[layer], cache.values[layer]
        num_heads, key_dim, value_dim = key.shape[0], key.shape[-1], value.shape[-1]
        group = query.shape[0] // num_heads
        grouped = query.transpose(0, 1).reshape(len(self.positions) * num_heads, group, key_dim)
        out = []
        for first, end, length in self.runs:
            is_proved = self.proof.holds(num_heads, group, key_dim, value_dim, length)
            step = end - first if is_proved else 1
            for start in range(first, end, step):
                rows = slice(self.first_row + start, self.first_row + start + step)
                seen = keys[rows, ..., :length].flatten(0, 1), values[rows, :, :length].flatten(0, 1)
                if not is_proved:
                    seen = seen[0].contiguous(), seen[1].contiguous()
                mask = self._mask(start, start + step, length, window, num_heads, group)
                out.append(
                    attend_grouped(
                        grouped[start * num_heads : (start + step) * num_heads],
                        seen[0],
                        seen[1],
                        mask,
                        scale,
                        few_values=0,
                    )
                )
        return torch.cat(out).view(len(self.positions), query.shape[0], value_dim)

    def _mask(self, first: int, end: int, length: int, window: int | None, num_heads: int, group: int) -> Tensor:
        """[sequences * H, group, length], additive."""
        name = (first, end, window, num_heads, group)
        if name not in self._masks:
            hidden_of = DecodeBatch(self.columns[first:end], length=length)
            self._masks[name] = hidden_of.mask(window, num_heads, group)
        return self._masks[name]


@dataclass
class SteadyPrefill:
    """Whole prompts in one pass, each attending by itself from memory of its own."""

    segments: list[PrefillSegment]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: SlotCache | None,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """As `Batch.attend`."""
        out = []
        for segment in self.segments:
            assert segment.cached == 0, "a deterministic prompt continues nobody's keys"
            q, k, v = (x[:, segment.start : segment.start + segment.length].contiguous() for x in (query, key, value))
            alone = PrefillBatch([replace(segment, start=0)])
            out.append(alone.attend(layer, q, k, v, cache, scale, window))
        return torch.cat(out)


# Passes


class DeterministicPasses:
    """The engine's passes (`slime.backends.embedded.passes.Passes`) in which no sequence feels another."""

    def __init__(self, model: ServedModel, cache: SlotCache, sampler: Sampler) -> None:
        self.model, self.cache, self.sampler = model, cache, sampler
        self.proof = AttentionProof(model.dtype)
        fix_rotations(model)
        make_steady(model)

    def prefill(
        self, tokens: list[int], positions: list[int], keep: list[int], segments: list[PrefillSegment]
    ) -> Tensor:
        """As `Passes.prefill`."""
        if self.model.is_fused:
            return self.model.logits(tokens, positions, torch.tensor(keep), SteadyPrefill(segments), self.cache)
        out = []
        for segment in segments:
            end = segment.start + segment.length
            mine = torch.tensor([index - segment.start for index in keep if segment.start <= index < end])
            batch = SteadyPrefill([replace(segment, start=0)])
            span = slice(segment.start, end)
            out.append(self.model.logits(tokens[span], positions[span], mine, batch, self.cache))
        return torch.cat(out)

    def decode(self, tokens: list[int], positions: list[int]) -> Tensor:
        """As `Passes.decode`."""
        if self.model.is_fused:
            batch = SteadyDecode(positions, self.proof)
            return self.model.logits(tokens, positions, None, batch, self.cache)
        return torch.cat(
            [
                self.model.logits([token], [position], None, SteadyDecode([position], self.proof, row), self.cache)
                for row, (token, position) in enumerate(zip(tokens, positions, strict=True))
            ]
        )

    def sample(self, logits: Tensor, rows: list[SamplingRow]) -> list[Sampled]:
        """As `Passes.sample`."""
        return [self.sampler.sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]

    @torch.inference_mode()
    def prove(self) -> None:
        """Compare sequences computed alone and together, bit by bit; raises `DeterminismError` where they differ.

        Uses the cache, which must hold nothing, and gives it back.
        """
        limit = self.cache.max_length - TRIAL_STEPS
        lengths = [min(length, limit) for length in TRIAL_LENGTHS][: self.cache.max_rows]
        generator = torch.Generator().manual_seed(1)
        sequences = [
            torch.randint(self.model.vocab_size, (length + TRIAL_STEPS,), generator=generator).tolist()
            for length in lengths
        ]
        alone = [self._logits([sequence]) for sequence in sequences]
        together = self._logits(sequences)
        self.cache.release()
        for index, length in enumerate(lengths):
            for step in range(TRIAL_STEPS + 1):
                if not torch.equal(alone[index][step][0], together[step][index]):
                    what = "the prompt" if step == 0 else f"token {step}"
                    raise DeterminismError(
                        f"After {what} of a prompt of {length} tokens, {self.model.path} gives other logits alone than "
                        f"amid {len(lengths) - 1} others"
                    )

    def _logits(self, sequences: list[list[int]]) -> list[Tensor]:
        """Logits [B, V] after the prompts and after each of the last `TRIAL_STEPS` tokens of `sequences`."""
        self.cache.release()
        self.cache.reserve(len(sequences), max(map(len, sequences)))
        tokens: list[int] = []
        positions: list[int] = []
        keep, segments = [], []
        for row, sequence in enumerate(sequences):
            length = len(sequence) - TRIAL_STEPS
            segments.append(PrefillSegment(len(tokens), length, 0, (row,)))
            tokens += sequence[:length]
            positions += range(length)
            keep.append(len(tokens) - 1)
        out = [self.prefill(tokens, positions, keep, segments)]
        for step in range(TRIAL_STEPS, 0, -1):
            out.append(self.decode([s[-step] for s in sequences], [len(s) - step for s in sequences]))
        return out
