"""Text and conversations to token rows.

sources, corpus ─► tokenizer ─► pack ─► stream ─► training
                   tokenizer ─► conversation ─► prompts, training rows, answers
tasks: problems whose answers can be checked, as conversations
"""
