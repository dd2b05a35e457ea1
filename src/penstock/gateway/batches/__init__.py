"""OpenAI's Files and Batch API: requests in a file, run in the background, answers in a file."""
