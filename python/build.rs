//! Says which commit the library is built from, as the program does.

#[path = "../cli/build.rs"]
mod commit;

fn main() {
    commit::main();
}
