"""What methods share: compositions, annotations, credit, options, and the checks of a recipe."""
