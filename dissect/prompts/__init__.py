"""Load prompts and tokenise them."""
