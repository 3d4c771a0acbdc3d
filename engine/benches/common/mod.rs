//! Helpers of the benchmarks.

#![allow(dead_code)] // each uses its own share

/// The median; for an even count, the greater of the middle two numbers.
pub fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// The machine and its load.
pub fn machine() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let minute = load.split_whitespace().next().unwrap_or("unknown");
    format!("{}; load of the last minute {minute}", engine::device_name())
}

/// The positional arguments of the command line, and the options' values by name.
pub struct Arguments {
    /// Positional arguments, in order.
    pub words: Vec<String>,
    options: Vec<(String, String)>,
}

impl Arguments {
    /// Parses the command line.
    ///
    /// # Panics
    /// If an option is not among `known`, or has no value.
    pub fn parse(known: &[&str]) -> Self {
        let (mut words, mut options) = (Vec::new(), Vec::new());
        let mut rest = std::env::args().skip(1).filter(|word| word != "--bench");
        while let Some(word) = rest.next() {
            match word.strip_prefix("--") {
                None => words.push(word),
                Some(name) => {
                    assert!(known.contains(&name), "--{name}: expected one of {known:?}");
                    options.push((name.to_owned(), rest.next().unwrap_or_else(|| panic!("--{name} takes a value"))));
                }
            }
        }
        Self { words, options }
    }

    /// The value of an option.
    ///
    /// # Panics
    /// If the value cannot be parsed.
    pub fn get<T: std::str::FromStr>(&self, name: &str, default: T) -> T {
        let given = self.options.iter().rev().find(|(option, _)| option == name);
        given.map_or(default, |(_, text)| text.parse().unwrap_or_else(|_| panic!("--{name}: cannot read {text:?}")))
    }

    /// The values of an option, separated by commas.
    ///
    /// # Panics
    /// If a value cannot be parsed.
    pub fn list<T: std::str::FromStr>(&self, name: &str, default: &str) -> Vec<T> {
        let text: String = self.get(name, default.to_owned());
        let item = |item: &str| item.parse().unwrap_or_else(|_| panic!("--{name}: cannot read {item:?}"));
        text.split(',').map(item).collect()
    }
}
