"""What else changed: answers to forget, retain and general prompts."""
