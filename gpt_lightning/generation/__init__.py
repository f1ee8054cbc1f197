"""Text generation: logits -> next token (sampling), model and prompt -> text (generator)."""
