"""Moving pictures: MP4 sample tables read and written, frames encoded and decoded. Knows schemas."""
