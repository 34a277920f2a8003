// How many fixtures run at the same time: as many guests as there are, on most machines that do nothing but test, processors for them.

[assembly: LevelOfParallelism(2)]
