"""Run folders: their files, records, tensors and edits."""
