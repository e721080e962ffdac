"""Memory kept from chunk to chunk.

Fresh memory of tens of megabytes comes from the system page by page, which takes a CPU longer than the softmax that is
written into it.
"""

import torch


class Reused:
    """Named pieces of memory, each as large as the largest tensor that was asked for under its name."""

    def __init__(self) -> None:
        """Start without any."""
        self._pieces: dict[str, torch.Tensor] = {}

    def take(self, name: str, like: torch.Tensor, rows: int | None = None, columns: int | None = None) -> torch.Tensor:
        """Return an uninitialised tensor in the memory `name`; what was taken under that name before is overwritten.

        Args:
            name: Which piece.
            like: Decides type and device, and the shape `[rows, columns]` where it is not given.
            rows: Rows.
            columns: Columns.
        """
        rows = like.shape[0] if rows is None else rows
        columns = like.shape[1] if columns is None else columns
        piece = self._pieces.get(name)
        if piece is None or piece.numel() < rows * columns or piece.dtype != like.dtype or piece.device != like.device:
            piece = self._pieces[name] = like.new_empty(rows * columns)
        return piece[: rows * columns].view(rows, columns)
