"""Benchmarks: cases and providers are data, correctness gates timing, every figure is a row in a file.

    python -m vitreous_core.bench core --case 'H1/*'
    python -m vitreous_core.bench.render

`case` says what a case, a provider and a goal are; `attention` makes them for local attention and `core_cases` lists
core's. `measure` holds the clocks and the roof, `runner` the order of events, `rows` the file format.
A paper adds cases with a module `bench.py` that has a function `cases() -> Sequence[Case]`.

Nothing is imported here: the command line must answer before torch is there.
"""
