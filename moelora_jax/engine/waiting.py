"""The queue: by priority, and among equals one sequence of each adapter in turn."""

from collections import OrderedDict
from collections.abc import Iterator

from moelora_jax.engine.sequence import Sequence


class WaitingQueue:
    """Sequences that wait, each adapter's in order of arrival.

    Adapters take turns, so that one with a thousand requests does not hold up one with a single
    request. Adding, taking and removing take constant time.
    """

    def __init__(self) -> None:
        self._levels: dict[int, OrderedDict[str | None, OrderedDict[Sequence, None]]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        for level in self._levels.values():
            for sequences in level.values():
                yield from sequences

    def add(self, sequence: Sequence, *, first: bool = False) -> None:
        """Queue a sequence: as the last one, or, if it ran before, as the first of all."""
        turns = self._levels.setdefault(sequence.priority, OrderedDict())
        sequences = turns.setdefault(sequence.adapter, OrderedDict())
        sequences[sequence] = None
        if first:
            sequences.move_to_end(sequence, last=False)
            turns.move_to_end(sequence.adapter, last=False)
        self._size += 1

    def heads(self) -> list[Sequence]:
        """The next sequence of each adapter, in the order in which they should be admitted."""
        return [
            next(iter(sequences))
            for priority in sorted(self._levels, reverse=True)
            for sequences in self._levels[priority].values()
        ]

    def take(self, sequence: Sequence) -> None:
        """Remove a sequence that is admitted: its adapter's turn is over."""
        self.remove(sequence)
        turns = self._levels.get(sequence.priority)
        if turns is not None and sequence.adapter in turns:
            turns.move_to_end(sequence.adapter)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence wherever it stands."""
        turns = self._levels[sequence.priority]
        del turns[sequence.adapter][sequence]
        if not turns[sequence.adapter]:
            del turns[sequence.adapter]
        if not turns:
            del self._levels[sequence.priority]
        self._size -= 1
