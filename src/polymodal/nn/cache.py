"""The memory of a running generation: keys and values in tensors of a fixed size, rows of different lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polymodal.core.errors import MediaError
from polymodal.core.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Which keys each query sees: a mask, or one of the two patterns that need none."""

    mask: Bool[Tensor, "batch 1 queries keys"] | None = None
    causal: bool = False


def sight(tokens: Tokens, window: int | None = None) -> Sight:
    """The attention pattern of a batch that sees itself only; plain causal and plain full ones need no mask.

    Padding at the end of a causal batch is seen by nothing that counts, so it needs no mask either. A ``window`` hides
    the tokens that lie so many places back, or more.
    """
    length = tokens.shape[1]
    order = torch.arange(length, device=tokens.block.device)
    alone = bool((tokens.sample == tokens.sample[:, :1]).all())
    near = window is None or length <= window
    if alone and near:
        padded_last = bool((tokens.valid[:, 1:] <= tokens.valid[:, :-1]).all())
        if padded_last and bool((tokens.block == order).all()):
            return Sight(causal=True)
        if bool(tokens.valid.all()) and bool((tokens.block == tokens.block[:, :1]).all()):
            return Sight()
    mask = tokens.mask()
    if not near:
        assert window is not None
        mask = mask & (order[:, None] - order < window)
    return Sight(mask=mask)


@runtime_checkable
class Keeps(Protocol):
    """What attention may look at beside the tokens that it reads."""

    def extend(
        self, layer: int, k: Float[Tensor, "rows heads new head_dim"], v: Float[Tensor, "rows heads new head_dim"]
    ) -> tuple[Float[Tensor, "rows heads keys head_dim"], Float[Tensor, "rows heads keys head_dim"]]:
        """All keys and values of one layer, given those of the new tokens."""
        ...


class KVCache:
    """Keys and values of every layer for ``rows`` sequences of at most ``capacity`` tokens.

    The tokens of a row lie in its first ``lengths[row]`` places: batches of different lengths are padded at the end,
    and what follows overwrites the padding. One row is one sequence; packed samples do not belong here. The tensors may
    hold spare rows after the last one: `select` moves rows in place and allocates only when there are too few.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        rows: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, rows, num_kv_heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.block = torch.zeros(rows, capacity, dtype=torch.int64, device=device)
        self.next_block = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.next_position = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.lengths = [0] * rows
        self._places: tuple[tuple[int, ...], Tensor] | None = None

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def next_tokens(self, x: Float[Tensor, "rows 1 dim"], modality: int) -> Tokens:
        """One more token a row, after all that a row has read: its position and block go on by one."""
        one = torch.ones_like(self.next_block)
        return Tokens(
            x=x,
            valid=one.bool(),
            block=self.next_block,
            position=self.next_position.unsqueeze(-1),
            modality=one * modality,
            sample=one * 0,
        )

    def after(self, tokens: Tokens) -> Tokens:
        """``tokens`` moved behind what the rows hold: blocks and positions, which count from zero in a new chunk."""
        return Tokens(
            x=tokens.x,
            valid=tokens.valid,
            block=tokens.block + self.next_block,
            position=tokens.position + self.next_position.unsqueeze(-1),
            modality=tokens.modality,
            sample=tokens.sample,
        )

    def sight(self, tokens: Tokens, window: int | None = None) -> Sight:
        """What the new tokens see: of the keys that `extend` gives back, which are theirs and the older ones.

        Raises:
            MediaError: a row has no room for the new tokens.
        """
        new = tokens.shape[1]
        longest = max(self.lengths)
        if longest + new > self.capacity:
            raise MediaError(
                f"{longest} tokens and {new} more do not fit into a cache of {self.capacity}: ask for more new tokens "
                "at the start, or shorten the prompt"
            )
        if longest == 0:
            return sight(tokens, window)
        start = min(self.lengths)
        if new == 1 and start == longest and (window is None or longest < window):
            return Sight()
        place = self._place(new)
        slot = torch.arange(longest + new, device=place.device)
        block = self.block[:, : longest + new].scatter(1, place, tokens.block)
        known = slot < place[:, :1] + tokens.valid.sum(1, keepdim=True)
        see = (tokens.block[:, :, None] >= block[:, None, :]) & known[:, None, :]
        if window is not None:
            see &= place[:, :, None] - slot < window
        return Sight(mask=(see | (slot == place[:, :, None])).unsqueeze(1))

    def _place(self, new: int) -> Int[Tensor, "rows new"]:
        """Where so many new tokens go in their rows: computed once for all layers of a step."""
        key = (new, *self.lengths)
        if self._places is None or self._places[0] != key:
            device = self.block.device
            start = torch.tensor(self.lengths, device=device)[:, None]
            self._places = key, start + torch.arange(new, device=device)
        return self._places[1]

    def extend(
        self, layer: int, k: Float[Tensor, "rows heads new head_dim"], v: Float[Tensor, "rows heads new head_dim"]
    ) -> tuple[Float[Tensor, "rows heads keys head_dim"], Float[Tensor, "rows heads keys head_dim"]]:
        """Stores the new keys and values of one layer and gives all that its rows hold; `advance` ends the step."""
        new, longest = k.shape[2], max(self.lengths)
        keys, values = self.keys[layer, : self.rows], self.values[layer, : self.rows]
        if min(self.lengths) == longest:
            keys[:, :, longest : longest + new] = k
            values[:, :, longest : longest + new] = v
        else:
            index = self._place(new)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
            keys.scatter_(2, index, k.to(keys.dtype))
            values.scatter_(2, index, v.to(values.dtype))
        return keys[:, :, : longest + new], values[:, :, : longest + new]

    def advance(self, tokens: Tokens) -> None:
        """Counts the new tokens as read; called once after the last layer."""
        new = tokens.shape[1]
        self.block.scatter_(1, self._place(new), tokens.block)
        valid = tokens.valid
        self.next_block = torch.maximum(
            self.next_block, (tokens.block + 1).masked_fill(~valid, 0).amax(1, keepdim=True)
        )
        last = tokens.position.amax(2) + 1
        self.next_position = torch.maximum(self.next_position, last.masked_fill(~valid, 0).amax(1, keepdim=True))
        added = [1] * self.rows if new == 1 else valid.sum(1).tolist()
        self.lengths = [a + b for a, b in zip(self.lengths, added, strict=True)]

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keeps these rows in this order, some perhaps more than once (beams), and frees the others.

        Only rows that change places are copied, and of those only what they hold.
        """
        order = rows.tolist()
        spare = len(order) - self.keys.shape[1]
        if spare > 0:  # at least doubled, so that rows that join one by one are not all copied each time
            room = self.keys.new_zeros(self.keys.shape[0], max(spare, self.keys.shape[1]), *self.keys.shape[2:])
            self.keys, self.values = (torch.cat([t, room], 1) for t in (self.keys, self.values))
        moved = [place for place, source in enumerate(order) if place != source]
        if moved:
            held = max(self.lengths[order[place]] for place in moved)
            sources = [order[place] for place in moved]
            for tensor in (self.keys, self.values):
                for layer in range(len(tensor)):  # one at a time: what moves is held twice meanwhile
                    tensor[layer, moved, :, :held] = tensor[layer, sources, :, :held]
        self.block, self.next_block = self.block[rows], self.next_block[rows]
        self.next_position = self.next_position[rows]
        self.lengths = [self.lengths[i] for i in order]

    def put(self, row: int, other: KVCache, source: int = 0) -> None:
        """Copies one row of another cache of the same shape of layers over a row of this one.

        Raises:
            MediaError: it holds more tokens than this cache has room for.
        """
        length = other.lengths[source]
        if length > self.capacity:
            raise MediaError(f"{length} tokens do not fit into a cache of {self.capacity}")
        self.keys[:, row, :, :length] = other.keys[:, source, :, :length]
        self.values[:, row, :, :length] = other.values[:, source, :, :length]
        self.block[row, :length] = other.block[source, :length]
        self.next_block[row], self.next_position[row] = other.next_block[source], other.next_position[source]
        self.lengths[row] = length

    def cut(self, row: int, length: int) -> None:
        """Forgets all but the first ``length`` tokens of a row of plain text, whose positions count by one."""
        assert 0 <= length <= self.lengths[row]
        back = self.lengths[row] - length
        self.next_block[row] -= back
        self.next_position[row] -= back
        self.lengths[row] = length
