"""How a run that goes on is asked how it stands, and told to have other numbers of replicas."""
