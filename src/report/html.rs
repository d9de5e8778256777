//! Text that becomes part of a page: everything that a user named goes through [`escape`] or [`script_json`], and nowhere else.

use serde_json::Value;
use std::fmt::Write;

/// `text` for element content and quoted attributes. Control characters but tab and newline become U+FFFD.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            '\t' | '\n' => out.push(c),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// JSON for a `<script type="application/json">`: no `<` survives, so no tag or comment can open or close in it.
pub fn script_json(value: &Value) -> String {
    value.to_string().replace('<', "\\u003c").replace('\u{2028}', "\\u2028").replace('\u{2029}', "\\u2029")
}

/// A number with `digits` behind the point; an en dash where there is none.
pub fn number(value: Option<f64>, digits: usize) -> String {
    match value.filter(|v| v.is_finite()) {
        Some(v) => format!("{v:.digits$}").replace('-', "−"),
        None => "–".into(),
    }
}

/// Three significant digits with a suffix: 1.23k, 45.6M.
pub fn brief(value: f64) -> String {
    if !value.is_finite() {
        return "–".into();
    }
    let size = value.abs();
    let text = match size {
        0.0 => "0".into(),
        s if s >= 1e9 => format!("{}G", significant(value / 1e9)),
        s if s >= 1e6 => format!("{}M", significant(value / 1e6)),
        s if s >= 1e4 => format!("{}k", significant(value / 1e3)),
        s if s >= 1e-4 => significant(value),
        _ => format!("{value:.1e}").replace(".0e", "e"),
    };
    text.replace('-', "−")
}

fn significant(value: f64) -> String {
    let digits = match value.abs() {
        s if s >= 100.0 => 0,
        s if s >= 10.0 => 1,
        s if s >= 1.0 => 2,
        s if s >= 0.1 => 3,
        s if s >= 0.01 => 4,
        _ => 6,
    };
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text,
    }
}

/// Standard base64, padded.
pub fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |w, &b| w << 8 | b as u32) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let letter = LETTERS[(word >> (18 - 6 * i)) as usize & 63] as char;
            out.push(if i <= chunk.len() { letter } else { '=' });
        }
    }
    out
}

/// The day of a time in seconds since 1970, as 2026-11-23 01:02 UTC.
pub fn day(seconds: f64) -> String {
    let seconds = seconds as i64;
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Howard Hinnant's civil_from_days.
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (d, m) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let y = yoe + era * 400 + i64::from(m <= 2);
    format!("{y:04}-{m:02}-{d:02} {:02}:{:02} UTC", rest / 3600, rest / 60 % 60)
}

/// A table: head cells and rows are HTML already. The first column is a row's head.
pub fn table(class: &str, caption: &str, head: &[String], rows: &[Vec<String>]) -> String {
    let mut out =
        format!("<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{}\">", escape(caption));
    let _ = write!(
        out,
        "<table class=\"{class}\"><caption class=\"unseen\">{}</caption><thead><tr>",
        escape(caption)
    );
    for cell in head {
        let _ = write!(out, "<th scope=\"col\">{cell}</th>");
    }
    out += "</tr></thead><tbody>";
    for row in rows {
        out += "<tr>";
        for (i, cell) in row.iter().enumerate() {
            let _ = match i {
                0 => write!(out, "<th scope=\"row\">{cell}</th>"),
                _ => write!(out, "<td>{cell}</td>"),
            };
        }
        out += "</tr>";
    }
    out + "</tbody></table></div>"
}

/// The same, folded away under `summary`.
pub fn folded_table(summary: &str, head: &[String], rows: &[Vec<String>]) -> String {
    format!(
        "<details class=\"data\"><summary>{}</summary>{}</details>",
        escape(summary),
        table("numbers", summary, head, rows)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn hostile_names_stay_text() {
        assert_eq!(escape("</script><b>\"'&\u{0}"), "&lt;/script&gt;&lt;b&gt;&quot;&#39;&amp;\u{fffd}");
        let data = script_json(&json!({"</script><!--": "a\u{2028}b<"}));
        assert!(!data.contains('<') && !data.contains('\u{2028}'));
        assert_eq!(serde_json::from_str::<Value>(&data).unwrap()["</script><!--"], "a\u{2028}b<");
    }

    #[test]
    fn base64_is_that_of_rfc_4648() {
        for (plain, coded) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn numbers_days_and_names_read_well() {
        let all = [0.0, 1234.0, 12345.0, 2.5e6, 0.25, 1e-5, -0.5].map(brief);
        assert_eq!(all, ["0", "1234", "12.3k", "2.5M", "0.25", "1e−5", "−0.5"]);
        assert_eq!(day(1_795_360_779.0), "2026-11-22 15:19 UTC");
        assert_eq!(day(951_782_400.0), "2000-02-29 00:00 UTC");
        assert_eq!((number(Some(-0.5), 2), number(None, 2)), ("−0.50".into(), "–".into()));
    }
}
