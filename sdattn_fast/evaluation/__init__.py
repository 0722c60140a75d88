"""One honest evaluation of all nine techniques: `sdattn-fast evaluate`."""
