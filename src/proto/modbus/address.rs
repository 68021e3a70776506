//! The `40001` notation of manuals: a digit for the table, then the item's number counted from 1.
//!
//! It is converted once, here; everything else counts from 0 as the wire does (V1.1b3 §4.4).

use thiserror::Error;

use super::Table;

/// Parses a reference of five digits (`40001`) or six (`400001`) into the table and the 0-based address.
///
/// # Errors
/// [`ReferenceError`] names what is wrong with `text`.
pub fn parse_reference(text: &str) -> Result<(Table, u16), ReferenceError> {
    if !matches!(text.len(), 5 | 6) || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(ReferenceError::Shape);
    }
    let (table, number) = text.split_at(1);
    let table = match table {
        "0" => Table::Coil,
        "1" => Table::DiscreteInput,
        "3" => Table::InputRegister,
        "4" => Table::HoldingRegister,
        _ => return Err(ReferenceError::Table),
    };
    let number: u32 = number.parse().map_err(|_| ReferenceError::Shape)?;
    let address = number.checked_sub(1).ok_or(ReferenceError::Zero)?;
    Ok((table, u16::try_from(address).map_err(|_| ReferenceError::TooHigh)?))
}

/// Why a text is no reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ReferenceError {
    #[error("a reference has five or six digits, as in 40001 or 400001")]
    Shape,
    #[error("a reference begins with 0 (coil), 1 (discrete input), 3 (input register) or 4 (holding register)")]
    Table,
    #[error("references count from 1, as in 40001; for 0-based addresses name the table, as in `holding_register: 0`")]
    Zero,
    #[error("a reference's number is at most 65536")]
    TooHigh,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_of_manuals_become_table_and_address() {
        let check = |text: &str, expected| assert_eq!(parse_reference(text), expected, "{text}");
        check("00001", Ok((Table::Coil, 0)));
        check("10017", Ok((Table::DiscreteInput, 16)));
        check("30001", Ok((Table::InputRegister, 0)));
        check("40001", Ok((Table::HoldingRegister, 0)));
        check("49999", Ok((Table::HoldingRegister, 9998)));
        check("400001", Ok((Table::HoldingRegister, 0)));
        check("465536", Ok((Table::HoldingRegister, 65_535)));
        check("465537", Err(ReferenceError::TooHigh));
        check("40000", Err(ReferenceError::Zero));
        check("20001", Err(ReferenceError::Table));
        check("4001", Err(ReferenceError::Shape));
        check("4000001", Err(ReferenceError::Shape));
        check("+4001", Err(ReferenceError::Shape));
        check("4x001", Err(ReferenceError::Shape));
    }
}
