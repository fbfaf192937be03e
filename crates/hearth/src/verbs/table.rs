//! Columns for people to read.

/// Aligns cells in columns as wide as their widest cell, two spaces apart.
pub fn render<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = header.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let mut line = |cells: [&str; N]| {
        let padded = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}  "));
        text.push_str(padded.collect::<String>().trim_end());
        text.push('\n');
    };
    line(header);
    for row in rows {
        line(row.each_ref().map(String::as_str));
    }
    text
}

/// A length of time in its largest whole unit: `59s`, `3m`, `2h`, `5d`.
pub fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..86_400 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Seconds since a time that the API gave in seconds since the epoch; 0 if it lies ahead.
pub fn since(epoch_seconds: f64) -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let then = std::time::Duration::try_from_secs_f64(epoch_seconds).unwrap_or_default();
    now.saturating_sub(then).as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let rows = [["a".to_owned(), "longer".to_owned(), "x".to_owned()], ["abc".to_owned(), String::new(), String::new()]];
        assert_eq!(render(["ID", "B", "C"], &rows), "ID   B       C\na    longer  x\nabc\n");
    }

    #[test]
    fn ages_are_in_their_largest_unit() {
        let ages: Vec<String> = [59, 60, 7_199, 86_400].map(age).into();
        assert_eq!(ages, ["59s", "1m", "1h", "1d"]);
    }
}
