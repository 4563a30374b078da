"""The documents that leave: what `--json` prints, the socket sends and HTTP answers.

Each shape is defined once, as the data class that builds it. HTTP derives its OpenAPI description
from these classes. The order of the fields is the order in the document. A later version may add
fields, so clients ignore those that they do not know.
"""
