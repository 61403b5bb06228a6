"""What the rooms agree on: records, protocols, configuration, errors. Imports no other room, no torch and no Ray."""
