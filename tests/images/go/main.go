package main

import (
	"io"
	"log"
	"net/http"
	"sync"
)

func main() {
	var keys sync.Map
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		switch r.Method {
		case http.MethodPut:
			value, err := io.ReadAll(r.Body)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			keys.Store(r.URL.Path, value)
			w.WriteHeader(http.StatusCreated)
		default:
			value, found := keys.Load(r.URL.Path)
			if !found {
				http.NotFound(w, r)
				return
			}
			w.Write(value.([]byte))
		}
	})
	log.Fatal(http.ListenAndServe(":8080", nil))
}
