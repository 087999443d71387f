"""What a run keeps on disk: its journal, its versions, and what is derived from them."""
