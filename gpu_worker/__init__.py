"""Worker groups: an orchestrator and its tensor-parallel ranks, which run the engine."""
