"""Generated text out: logits -> next token (sampling) -> ids (engine) -> text (writer)."""
