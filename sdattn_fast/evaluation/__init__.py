"""One honest evaluation of all nine techniques, and of peers beside them: `sdattn-fast evaluate`."""
