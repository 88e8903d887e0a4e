"""Text and files in -> ids, documents and batches out; nothing above them is known here."""
