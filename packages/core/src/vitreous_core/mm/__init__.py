"""The only place in core that imports MMEngine and MMPretrain (extra: `vitreous-core[mm]`)."""
