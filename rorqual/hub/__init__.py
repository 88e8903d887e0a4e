"""Other people's models -> ours, ours -> theirs: DeepSeek folders, the transformers face, memory on any host."""
