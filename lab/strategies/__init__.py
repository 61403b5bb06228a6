"""Chains of sums and differences, each of which several strategies solve, in the words of a teacher and of a student.

A second skill, of which the distillation set has nothing, shows what is forgotten. The splits lie beside the others:
`lab:strategies-train`, `lab:second-test` and so on.
"""
