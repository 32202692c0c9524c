"""The schedule of ``flash_decode``: tasks as data, policies that hand them to programs, a simulated GPU, and traces."""
