// Two emulated machines at a time: each has one processor, and waits for nobody.

[assembly: LevelOfParallelism(2)]
