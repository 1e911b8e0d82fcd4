"""The browser interface: jobs and runs on the server (no gradio), and the page that shows them."""
