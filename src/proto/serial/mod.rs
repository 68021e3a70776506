//! What serial devices send and take: bytes to frames, frames to values, commands to bytes.
//!
//! A [`Framer`] cuts the byte stream into frames; a [`Parser`] reads values out of a text frame; a [`Template`] writes
//! a command. Binary frames, and text that needs more than this, go to a payload codec (`field::codec`) instead of the
//! parser. There is no specification: these are the habits of scales, meters, barcode readers and sensors.

mod frame;
mod parse;
mod template;

pub use frame::{ByteOrder, FrameCounts, Framer, Framing, FramingError, MAX_FRAME_BYTES, Prefix};
pub use parse::{
    Flattened, MAX_POINTS_PER_FRAME, ParseError, ParseRule, Parser, PointRule, PointType, PointValue, RuleError,
    flatten, point_name,
};
pub use template::{MAX_COMMAND_BYTES, Template, TemplateError};
