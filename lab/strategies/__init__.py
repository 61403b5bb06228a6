"""The lab's second half: chains of sums and differences, each of which several strategies solve.

The teacher works by all of the strategies. The student mostly guesses, and when it does follow a strategy it words the
same steps otherwise. A second skill, of which the distillation set has nothing, shows what is forgotten. Its splits and
models lie beside the others: `lab:strategies-train`, `lab:second-test`, `lab:strategies-student` and so on.
`python -m tutorloop.lab.strategies.build` makes all of it again from a seed.
"""
