"""Operations: one folder each, with its contract, its plain-torch truth and its fast backends."""
