"""Shards as strangers may read them: rows name a local target by the last part of its path."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hf_draftkd.data.shards import shard_path


def public_shards(folder: Path, count: int, target: str, public: str, scratch: Path) -> list[Path]:
    """The shards to upload.

    Args:
        folder: Finished alignment data; not changed.
        count: Its shards.
        target: Name of the target in its rows.
        public: What strangers read instead. Where that is the same, the shards themselves are uploaded.
        scratch: An empty folder for rewritten shards; as much as the data have must fit on its disk.
    """
    paths = [shard_path(folder, number, count) for number in range(count)]
    return paths if public == target else [_renamed(path, scratch / path.name, target, public) for path in paths]


def _renamed(source: Path, destination: Path, old: str, new: str) -> Path:
    with (
        pq.ParquetFile(source) as file,
        # The schema carries the features, by which `datasets` reads the columns as they were written.
        pq.ParquetWriter(destination, file.schema_arrow, write_page_index=True) as writer,
    ):
        # One row group at a time: rows with cached distributions are large.
        for number in range(file.num_row_groups):
            rows = file.read_row_group(number)
            position = rows.schema.get_field_index("target")
            names = rows.column(position)
            renamed = pc.if_else(pc.equal(names, old), pa.scalar(new, names.type), names)
            rows = rows.set_column(position, rows.schema.field(position), renamed)
            writer.write_table(rows, row_group_size=rows.num_rows)
    return destination
