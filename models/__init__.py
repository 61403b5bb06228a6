"""transformers models as the rooms use them: located, loaded, packed without padding, read by token, put in buckets.

Below the rooms: actors, teacher_service and learner import it, and it imports only contracts.
"""
